// The Python module fastadv._C: raw pointers, sizes and scalars in, nothing of PyTorch included, so one binary serves every
// version of torch. fastadv/native.py turns tensors into these arguments. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py
#include "loss.h"
#include "step.h"

namespace py = pybind11;
using namespace fastadv;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

StepArgs step_args(uintptr_t out, uintptr_t adv, uintptr_t grad, uintptr_t x, int64_t samples, int64_t size, int dtype,
                   int grad_dtype, double alpha, double eps, double lo, double hi, uintptr_t alphas, uintptr_t radii) {
  return {pointer<void>(out), pointer<void>(adv), pointer<void>(grad), pointer<void>(x), samples, size, DType(dtype),
          DType(grad_dtype), alpha, eps, lo, hi, pointer<double>(alphas), pointer<double>(radii)};
}

StartArgs start_args(uintptr_t out, uintptr_t x, int64_t samples, int64_t size, int dtype, double eps, double lo, double hi,
                     uintptr_t radii, uint64_t seed) {
  return {pointer<void>(out), pointer<void>(x), samples, size, DType(dtype), eps, lo, hi, pointer<double>(radii), seed};
}

using StepKernel = void (*)(const StepArgs&, int);
using LossKernel = void (*)(const LossArgs&, int);

// Defines module.name(out, adv, grad, x, samples, size, dtype, grad_dtype, alpha, eps, lo, hi, alphas, radii, threads).
template <StepKernel kernel>
void def_step(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t out, uintptr_t adv, uintptr_t grad, uintptr_t x, int64_t samples, int64_t size, int dtype,
                 int grad_dtype, double alpha, double eps, double lo, double hi, uintptr_t alphas, uintptr_t radii,
                 int threads) {
    py::gil_scoped_release nogil;
    kernel(step_args(out, adv, grad, x, samples, size, dtype, grad_dtype, alpha, eps, lo, hi, alphas, radii), threads);
  });
}

// Defines module.name(loss, grad, grad_ref, logits, logits_ref, labels, soft, targets, rows, classes, dtype, threads).
template <LossKernel kernel>
void def_loss(py::module_& m, const char* name) {
  m.def(name, [](uintptr_t loss, uintptr_t grad, uintptr_t grad_ref, uintptr_t logits, uintptr_t logits_ref,
                 uintptr_t labels, uintptr_t soft, uintptr_t targets, int64_t rows, int64_t classes, int dtype,
                 int threads) {
    py::gil_scoped_release nogil;
    kernel({pointer<void>(loss), pointer<void>(grad), pointer<void>(grad_ref), pointer<void>(logits),
            pointer<void>(logits_ref), pointer<int64_t>(labels), pointer<void>(soft), pointer<int64_t>(targets), rows,
            classes, DType(dtype)},
           threads);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastadv's native kernels; call them through fastadv.ops";

  def_step<linf_step_cpu>(m, "linf_step");
  def_step<l2_step_cpu>(m, "l2_step");
  m.def("l1_step", [](uintptr_t out, uintptr_t adv, uintptr_t grad, uintptr_t x, int64_t samples, int64_t size, int dtype,
                      int grad_dtype, double alpha, double eps, double lo, double hi, uintptr_t alphas, uintptr_t radii,
                      double fraction, int threads) {
    py::gil_scoped_release nogil;
    l1_step_cpu(step_args(out, adv, grad, x, samples, size, dtype, grad_dtype, alpha, eps, lo, hi, alphas, radii), fraction,
                threads);
  });

  m.def("linf_start", [](uintptr_t out, uintptr_t x, int64_t samples, int64_t size, int dtype, double eps, double lo, double hi,
                         uintptr_t radii, uint64_t seed, int threads) {
    py::gil_scoped_release nogil;
    linf_start_cpu(start_args(out, x, samples, size, dtype, eps, lo, hi, radii, seed), threads);
  });

  def_loss<ce_cpu>(m, "ce");
  def_loss<log_odds_cpu>(m, "log_odds");
  def_loss<margin_cpu>(m, "margin");
  def_loss<dlr_cpu>(m, "dlr");
  def_loss<dlr_targeted_cpu>(m, "dlr_targeted");
  def_loss<kl_cpu>(m, "kl");
  def_loss<se_cpu>(m, "se");

  // The vectorised elementary functions, exposed so that tests can measure their error.
  m.def("exp", [](float x) { return exp_(x); });
  m.def("log", [](float x) { return log_(x); });

#ifdef FASTADV_WITH_CUDA
  m.def("linf_start_cuda", [](uintptr_t out, uintptr_t x, int64_t samples, int64_t size, int dtype, double eps, double lo,
                              double hi, uintptr_t radii, uint64_t seed, uintptr_t stream) {
    py::gil_scoped_release nogil;
    linf_start_cuda(start_args(out, x, samples, size, dtype, eps, lo, hi, radii, seed), pointer<void>(stream));
  });
  m.def("linf_step_cuda", [](uintptr_t out, uintptr_t adv, uintptr_t grad, uintptr_t x, int64_t samples, int64_t size,
                             int dtype, int grad_dtype, double alpha, double eps, double lo, double hi, uintptr_t alphas,
                             uintptr_t radii, uintptr_t stream) {
    py::gil_scoped_release nogil;
    linf_step_cuda(step_args(out, adv, grad, x, samples, size, dtype, grad_dtype, alpha, eps, lo, hi, alphas, radii),
                   pointer<void>(stream));
  });
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
