"""TPU: slices of a torus, compiled for by libtpu, with or without the chips."""

from neocc.backends.base import Backend
from neocc.backends.tpu.collectives import FORMS
from neocc.backends.tpu.compile import compile_lowered, describe, places, slice_shape, start

BACKEND = Backend(
    kind="tpu",
    describe=describe,
    start=start,
    places=places,
    slice_shape=slice_shape,
    compile=compile_lowered,
    forms=FORMS,
)
