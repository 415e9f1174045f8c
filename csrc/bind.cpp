// The Python module fastadv._C: raw pointers, sizes and scalars in, nothing of PyTorch included, so one binary serves every
// version of torch. fastadv/native.py turns tensors into these arguments. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "build_info.h"  // written by setup.py
#include "launch.h"
#include "loss.h"
#include "step.h"
#include "weights.h"

namespace py = pybind11;
using namespace fastadv;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// CPU kernels take a number of threads last, CUDA kernels a stream; from Python both are one integer.
template <class Args>
void call(void (*kernel)(const Args&, int), const Args& args, uintptr_t threads) {
  py::gil_scoped_release nogil;
  kernel(args, int(threads));
}

template <class Args>
void call(void (*kernel)(const Args&, void*), const Args& args, uintptr_t stream) {
  py::gil_scoped_release nogil;
  kernel(args, pointer<void>(stream));
}

template <auto kernel>
void def_step(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t out, uintptr_t adv, uintptr_t grad, uintptr_t x, int64_t samples, int64_t size, int dtype,
                 int grad_dtype, double alpha, double eps, double lo, double hi, uintptr_t alphas, uintptr_t radii,
                 double fraction, uintptr_t workspace, uintptr_t where) {
    const StepArgs args{pointer<void>(out),      pointer<void>(adv),     pointer<void>(grad), pointer<void>(x), samples, size,
                        DType(dtype),            DType(grad_dtype),      alpha,               eps,              lo,      hi,
                        pointer<double>(alphas), pointer<double>(radii), fraction,            pointer<L2Sums>(workspace)};
    call(kernel, args, where);
  });
}

template <auto kernel>
void def_apgd(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t adv, uintptr_t old, uintptr_t best, uintptr_t best_grad, uintptr_t image, uintptr_t grad, uintptr_t x,
                 int64_t samples, int64_t size, int dtype, int grad_dtype, double alpha, double momentum, double eps, double lo,
                 double hi, uintptr_t alphas, uintptr_t momenta, uintptr_t radii, uintptr_t better, uintptr_t taken,
                 uintptr_t where) {
    const ApgdArgs args{pointer<void>(adv), pointer<void>(old), pointer<void>(best), pointer<void>(best_grad),
                        pointer<void>(image), pointer<void>(grad), pointer<void>(x), samples, size, DType(dtype),
                        DType(grad_dtype),
                        {alpha, momentum, eps, lo, hi, pointer<double>(alphas), pointer<double>(momenta), pointer<double>(radii)},
                        pointer<bool>(better), pointer<bool>(taken)};
    call(kernel, args, where);
  });
}

template <auto kernel>
void def_momentum(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t adv, uintptr_t velocity, uintptr_t grad, uintptr_t x, int64_t samples, int64_t size, int dtype,
                 int grad_dtype, double alpha, double decay, double eps, double lo, double hi, uintptr_t alphas,
                 uintptr_t decays, uintptr_t radii, uintptr_t sums, uintptr_t where) {
    const MomentumArgs args{pointer<void>(adv), pointer<void>(velocity), pointer<void>(grad), pointer<void>(x), samples, size,
                            DType(dtype), DType(grad_dtype),
                            {alpha, decay, eps, lo, hi, pointer<double>(alphas), pointer<double>(decays), pointer<double>(radii)},
                            pointer<double>(sums)};
    call(kernel, args, where);
  });
}

template <auto kernel>
void def_start(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t out, uintptr_t x, int64_t samples, int64_t copies, int64_t size, int dtype, double eps, double lo,
                 double hi, uintptr_t radii, int64_t seed, uintptr_t numbers, uint32_t step, uintptr_t where) {
    const StartArgs args{pointer<void>(out),     pointer<void>(x), samples, copies, size, DType(dtype), eps, lo, hi,
                         pointer<double>(radii), uint64_t(seed),   pointer<int64_t>(numbers), step};
    call(kernel, args, where);
  });
}

template <auto kernel>
void def_hyperplane(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t out, uintptr_t x, uintptr_t w, uintptr_t gaps, int64_t points, int64_t planes, int64_t size,
                 int dtype, int w_dtype, double lo, double hi, uintptr_t where) {
    const HyperplaneArgs args{pointer<void>(out), pointer<void>(x), pointer<void>(w), pointer<double>(gaps), points, planes,
                              size,               DType(dtype),     DType(w_dtype),   lo,                    hi};
    call(kernel, args, where);
  });
}

template <auto kernel>
void def_loss(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t loss, uintptr_t grad, uintptr_t grad_ref, uintptr_t logits, uintptr_t logits_ref,
                 uintptr_t labels, uintptr_t soft, uintptr_t targets, int64_t rows, int64_t classes, int dtype,
                 uintptr_t where) {
    const LossArgs args{pointer<void>(loss),       pointer<void>(grad),     pointer<void>(grad_ref), pointer<void>(logits),
                        pointer<void>(logits_ref), pointer<int64_t>(labels), pointer<void>(soft),
                        pointer<int64_t>(targets), rows, classes, DType(dtype)};
    call(kernel, args, where);
  });
}

// Tables: one list for each field of Weight.
template <auto kernel>
void def_weights(py::module_& m, const char* name) {
  using Column = std::vector<uintptr_t>;
  m.def(name, [](const Column& weights, const Column& grads, const Column& origins, const std::vector<int64_t>& sizes,
                 const std::vector<int>& dtypes, const std::vector<int>& grad_dtypes, uintptr_t sums, int64_t slices,
                 bool record, double gamma, double alpha, uintptr_t where) {
    std::vector<Weight> tensors;
    for (size_t t = 0; t < weights.size(); ++t)
      tensors.push_back({pointer<void>(weights.at(t)), pointer<void>(grads.at(t)), pointer<void>(origins.at(t)), sizes.at(t),
                         DType(dtypes.at(t)), DType(grad_dtypes.at(t))});
    const WeightsArgs args{tensors.data(), int64_t(tensors.size()), pointer<WeightSums>(sums), slices, record, gamma, alpha};
    call(kernel, args, where);
  });
}

// The choices of csrc/launch.h, as tests see them: needs neither a GPU nor a CUDA build.
py::tuple as_tuple(const Launch& plan) {
  return py::make_tuple(plan.blocks, plan.rows, plan.threads, plan.shared, plan.cluster);
}

void def_launches(py::module_ m) {
  m.def("stream", [](int64_t rows, int64_t items) { return as_tuple(stream_launch(rows, items)); });
  m.def("l2", [](int sms, int64_t shared, int cluster, int64_t samples, int64_t items, int64_t item_bytes) {
    return as_tuple(l2_launch({sms, shared, cluster}, samples, items, item_bytes));
  });
  m.def("share", [](int rank, int cluster, int64_t count) {
    const Share share = share_of(rank, cluster, count);
    return py::make_tuple(share.begin, share.end);
  });
  m.def("apply", [](int64_t samples, int64_t items) { return as_tuple(apply_launch(samples, items)); });
  m.def("sums", [](int64_t samples, int64_t items) { return as_tuple(sums_launch(samples, items)); });
  m.attr("sum_chunks") = kSumChunks;
  m.def("l1", [](int64_t samples, int64_t size) { return as_tuple(l1_launch(samples, size)); });
  m.def("weight_blocks", weight_blocks);
  m.attr("table_tensors") = kTableTensors;
  m.def("row", [](int64_t rows, int64_t classes, bool wide) {
    const RowLaunch plan = row_launch(rows, classes, wide);
    return py::make_tuple(as_tuple(plan.launch), plan.lanes, plan.items);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastadv's native kernels; call them through fastadv.ops";

  def_step<linf_step_cpu>(m, "linf_step");
  def_step<l2_step_cpu>(m, "l2_step");
  def_step<l1_step_cpu>(m, "l1_step");
  def_apgd<apgd_step_cpu>(m, "apgd_step");
  def_momentum<momentum_step_cpu>(m, "momentum_step");
  def_start<linf_start_cpu>(m, "linf_start");
  def_start<normal_start_cpu>(m, "normal_start");
  def_hyperplane<linf_hyperplane_cpu>(m, "linf_hyperplane");
  def_hyperplane<l2_hyperplane_cpu>(m, "l2_hyperplane");
  def_hyperplane<l1_hyperplane_cpu>(m, "l1_hyperplane");

  def_loss<ce_cpu>(m, "ce");
  def_loss<log_odds_cpu>(m, "log_odds");
  def_loss<margin_cpu>(m, "margin");
  def_loss<dlr_cpu>(m, "dlr");
  def_loss<dlr_targeted_cpu>(m, "dlr_targeted");
  def_loss<kl_cpu>(m, "kl");
  def_loss<se_cpu>(m, "se");

  def_weights<weight_sums_cpu>(m, "weight_sums");
  def_weights<perturb_cpu>(m, "perturb");

  def_launches(m.def_submodule("launches"));

  // The vectorised elementary functions, exposed so that tests can measure their error.
  m.def("exp", [](float x) { return exp_(x); });
  m.def("log", [](float x) { return log_(x); });

#ifdef FASTADV_WITH_CUDA
  def_step<linf_step_cuda>(m, "linf_step_cuda");
  def_step<l2_step_cuda>(m, "l2_step_cuda");
  def_step<l1_step_cuda>(m, "l1_step_cuda");
  def_apgd<apgd_step_cuda>(m, "apgd_step_cuda");
  def_momentum<momentum_step_cuda>(m, "momentum_step_cuda");
  def_start<linf_start_cuda>(m, "linf_start_cuda");
  def_start<normal_start_cuda>(m, "normal_start_cuda");
  m.def("l2_workspace_cuda", [](int64_t samples, int64_t size, int dtype) {
    return l2_workspace_cuda(samples, size, DType(dtype));
  });

  def_weights<weight_sums_cuda>(m, "weight_sums_cuda");
  def_weights<perturb_cuda>(m, "perturb_cuda");

  def_loss<ce_cuda>(m, "ce_cuda");
  def_loss<log_odds_cuda>(m, "log_odds_cuda");
  def_loss<margin_cuda>(m, "margin_cuda");
  def_loss<dlr_cuda>(m, "dlr_cuda");
  def_loss<dlr_targeted_cuda>(m, "dlr_targeted_cuda");
  def_loss<kl_cuda>(m, "kl_cuda");
  def_loss<se_cuda>(m, "se_cuda");
#endif

  py::dict info;
  info["cxx"] = FASTADV_CXX;
  info["nvcc"] = FASTADV_NVCC;
  info["cuda_archs"] = FASTADV_ARCHS;
  info["cuda_note"] = FASTADV_CUDA_NOTE;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  m.attr("build_info") = info;
}
