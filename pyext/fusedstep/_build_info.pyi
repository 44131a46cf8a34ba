torch_version: str
cuda: str | None
cuda_architectures: tuple[str, ...]
why_no_cuda: str | None
compiler: str
machine: str
