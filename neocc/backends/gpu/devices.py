"""What XLA's GPU compiler asks of a GPU that is not there: a description in its own terms.

The figures are NVIDIA's and XLA's (github.com/openxla/xla, xla/backends/gpu/target_config/specs).
CUDA 13's assembler has no Volta, so V100 is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Description:
    """A GPU as its compiler sees it.

    capability: CUDA's compute capability; accelerated: with the instructions of that generation
    alone (sm_90a). cores: multiprocessors, and units: f32 lanes of one. clock in GHz; bandwidth of
    its memory in bytes/s; memory, l2 in bytes; shared: bytes of a multiprocessor's shared memory,
    and the most that one block may have of it.
    """

    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    units: int
    clock: float
    memory: int
    bandwidth: int
    l2: int
    shared: tuple[int, int]

    def text(self) -> str:
        """A ``GpuTargetConfigProto`` in text form. Limits of blocks and registers are the same for
        all of these; cuDNN's version is that which JAX's CUDA wheels are built for."""
        major, minor = self.capability
        features = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared[0]}
              shared_memory_per_block_optin: {self.shared[1]}
              core_count: {self.cores}
              fpus_per_core: {self.units}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2}
              cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: {features}
              }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 13 minor: 0 patch: 0 }}
            device_description_str: "{self.name}"
            """


AMPERE, HOPPER = (167936, 166912), (233472, 232448)

DESCRIPTIONS: Mapping[str, Description] = MappingProxyType(
    {
        "a100-40gb": Description(
            "NVIDIA A100-SXM4-40GB", (8, 0), False, 108, 64, 1.41,
            42331013120, 1555200000000, 41943040, AMPERE,
        ),
        "a100-80gb": Description(
            "NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 1.41,
            85100068864, 2039040000000, 41943040, AMPERE,
        ),
        "h100": Description(
            "NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 1.98,
            84942979072, 3352320000000, 52428800, HOPPER,
        ),
        "h200": Description(
            "NVIDIA H200", (9, 0), True, 132, 128, 1.98,
            151397597184, 4800000000000, 52428800, HOPPER,
        ),
        "b200": Description(
            "NVIDIA B200", (10, 0), True, 148, 128, 1.965,
            191514411008, 7672320000000, 132644864, HOPPER,
        ),
        "gb200": Description(
            "NVIDIA GB200", (10, 0), True, 152, 128, 2.062,
            197897748480, 7928064000000, 135528448, HOPPER,
        ),
        "b300": Description(
            "NVIDIA B300", (10, 3), True, 158, 128, 1.965,
            297021865984, 7936000000000, 135528448, HOPPER,
        ),
        "gb300": Description(
            "NVIDIA GB300", (10, 3), True, 152, 128, 2.07,
            297021079552, 7928064000000, 135528448, HOPPER,
        ),
    }
)  # fmt: skip
