class TwinError(Exception):
    pass


class Twin:
    def __init__(self, *a):
        raise TwinError("stub")
