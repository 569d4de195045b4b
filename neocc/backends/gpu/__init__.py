"""GPU: nodes of one NVLink domain each, compiled for by XLA's CUDA plugin, with or without them."""

from neocc.backends.base import Backend, Option
from neocc.backends.gpu import attention
from neocc.backends.gpu.compile import describe, start

OPTIONS = (
    Option(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        "plans count transfers that run behind compute; of this XLA both values give the same"
        " program, with collectives started early, and other versions' defaults differ",
    ),
    Option(
        "xla_gpu_memory_limit_slop_factor",
        118,
        "XLA would compute values again above 77 % of the memory; what is computed again is the"
        " plan's choice, and it fits into 92 %",
    ),
)

BACKEND = Backend(
    kind="gpu",
    describe=describe,
    start=start,
    options=OPTIONS,
    kernels={f"{kind}=cudnn": kernel for kind, kernel in attention.KERNELS.items()},
    calls=attention.calls,
)
