"""TPU: slices of a torus, compiled for by libtpu, with or without the chips."""

from neocc.backends.base import Backend, Option
from neocc.backends.tpu import attention, collectives
from neocc.backends.tpu.bodies import read
from neocc.backends.tpu.compile import compile_lowered, describe, places, slice_shape, start

OPTIONS = (
    Option(
        "xla_tpu_enable_latency_hiding_scheduler",
        True,
        "plans count transfers that run behind compute: this starts them early and ends them late;"
        " libtpu 0.0.42's own default, said so that it stays",
    ),
    Option(
        "xla_enable_async_all_gather",
        True,
        "a gather of weights starts early and ends late; libtpu's own default on v5e alone",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        True,
        "what such a gather does goes into the products that it runs beside, without which the"
        " compiler puts its start and end together again",
    ),
)

BACKEND = Backend(
    kind="tpu",
    describe=describe,
    start=start,
    places=places,
    slice_shape=slice_shape,
    options=OPTIONS,
    compile=compile_lowered,
    read=read,
    kernels={f"{kind}=splash": kernel for kind, kernel in attention.SPLASH.items()},
    forms=collectives.FORMS,
    calls=lambda op, mesh: [*collectives.calls(op, mesh), *attention.calls(op, mesh)],
)
