"""What training systems do beside their stated plan: which transfers run behind compute, which
kernels are fused. Facts of a system and its time, each with a source. None is fitted to a row, but
they were looked for where predictions missed: the split into rows that an efficiency is fitted on
and rows that test it does not guard against that."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class System:
    """A training system at one time. Seconds, bytes, and shares from 0 to 1."""

    name: str
    source: str

    # Rate of the products in its fused attention kernel, as a share of a large product's;
    # exponentials come on top. None: scores are stored, their products are priced as any other.
    attention: float | None = 1.0
    dropout: bool = False  # between softmax and values, a kernel of its own
    loss: float = 0.0  # bytes moved per logit by the kernels of a loss that is not fused
    sequence: bool = True  # tensor parallelism comes with sequence parallelism
    # Recomputation runs the whole forward pass again, its collectives included. Else it leaves out
    # what only the layer's output needs, and gathers once for the products and their gradients.
    rerun: bool = True

    tensor_overlap: float = 0.0  # of the tensor axis' transfers that can run behind products
    narrow_gathers: bool = False  # activations are gathered in the products' narrow dtype
    cast_weights: float = 0.0  # bytes moved per weight and product to cast it; 0: once a step

    reduce_overlap: bool = True  # gradients are reduced and weights gathered behind compute
    sharded: bool = True  # each data replica updates its share of the weights (ZeRO-1)
    grad_bytes: float = 4.0  # of a gradient that is sent
    accumulate: float = 0.0  # bytes moved per weight and microbatch to add gradients up
    update: float = 40.0  # bytes moved per parameter by the optimizer

    send_overlap: bool = False  # pipeline sends run behind compute
    sends_cut: bool = True  # each tensor parallel device sends its share

    # FSDP, ZeRO-3
    bucketed: bool = True  # a layer's weights travel as one
    regather: bool = False  # they are gathered for recomputation and for gradients
    copies: float = 0.0  # bytes moved in memory per byte sent, to and from a flat buffer
    weight_overlap: float = 0.9  # of weight transfers that can run behind compute

    host: float = 0.0  # seconds that the host takes to launch a kernel; it bounds small layers


# f32 logits made, maximum, difference, exponential, sum, quotient, gradient: ten passes of 4 bytes.
EAGER_LOSS = 40.0

# A gather or scatter that is cut into the n steps of a ring, between those of its product, leaves
# one of the n waited for; n is 4 to 8 here.
RING = 0.8

MEGATRON_2021 = System(
    "Megatron-LM 2021",
    "arXiv 2104.04473: softmax fused, over stored scores; all-reduces of tensor and data"
    " parallelism waited for; scatter/gather of pipeline sends (sections 4.1, 4.2). f16 gradients,"
    " added up in a buffer of their own: two reads and a write of 2 bytes",
    attention=None,
    dropout=True,
    loss=EAGER_LOSS,
    sequence=False,
    reduce_overlap=False,
    sharded=False,
    grad_bytes=2.0,
    accumulate=6.0,
    update=50.0,
)
MEGATRON_2022 = System(
    "Megatron-LM 2022",
    "arXiv 2205.05198: sequence parallelism, stored scores, selective recomputation; gradients are"
    " added up within their products",
    attention=None,
    dropout=True,
    loss=EAGER_LOSS,
    reduce_overlap=False,
    sharded=False,
    update=50.0,
)
ZERO_3 = System(
    "DeepSpeed ZeRO-3 2021",
    "arXiv 2104.04473 section 5.2; arXiv 2104.07857 section 4.1: parameters are loaded for the"
    " forward pass, for its recomputation and for the gradients. DeepSpeed 0.3 gathers each"
    " parameter, and scatters its gradient, by a collective of its own, small ones excepted, and"
    " waits; torch.distributed.all_gather and reduce_scatter of lists copy to and from a flat"
    " buffer",
    attention=None,
    dropout=True,
    loss=EAGER_LOSS,
    sequence=False,
    grad_bytes=2.0,
    bucketed=False,
    regather=True,
    copies=2.0,
    weight_overlap=0.0,
    update=50.0,
)
MEGATRON_CORE = System(
    "Megatron-Core 2024",
    "Megatron-LM README, r0.8.0: data, tensor and pipeline parallel communication overlapped,"
    " distributed optimizer, f32 gradients. Transformer Engine of its time preferred"
    " FlashAttention-2: 35 % of the peak of an H100 (arXiv 2407.08608, abstract), where large"
    " products alone reach 70",
    attention=0.5,
    loss=EAGER_LOSS,
    tensor_overlap=RING,
    send_overlap=True,
)
BRIDGE = System(
    "Megatron Bridge",
    "Megatron Bridge performance guide and scripts/performance: as Megatron-Core, with a fused"
    " loss, attention by cuDNN, Megatron FSDP with a bucket a layer; no recomputation (on GB200 and"
    " GB300 activations are offloaded to the CPU)",
    tensor_overlap=RING,
    send_overlap=True,
)
TORCHTITAN = System(
    "torchtitan",
    "torchtitan benchmarks, December 2024: FSDP2 prefetches a layer ahead, sequence parallelism,"
    " tensor parallel collectives waited for, tensorwise float8 gathered as float8. Attention by"
    " PyTorch's own kernel, FlashAttention-2 (as Megatron-Core 2024). Recomputation stops at the"
    " last tensor that is needed (torch.utils.checkpoint, early_stop)",
    attention=0.5,
    rerun=False,
    narrow_gathers=True,
)
TORCHTITAN_ASYNC = replace(
    TORCHTITAN,
    name="torchtitan, async TP",
    source=TORCHTITAN.source + "; here decomposed and overlapped",
    tensor_overlap=RING,
)
MAXTEXT = System(
    "MaxText",
    "MaxText configs: XLA's latency-hiding scheduler, collective matmuls on the tensor axis, splash"
    " attention (its share is taken as that of GPU kernels), optimizer state sharded with the"
    " weights. Layers are a scan, whose stacked gradients are reduced over slices when it has"
    " ended. AQT and Qwix scale by maxima of rows and of columns, of activations and of gathered"
    " weights, at each product",
    attention=0.7,
    rerun=False,
    tensor_overlap=RING,
    cast_weights=5.0,
    reduce_overlap=False,
    bucketed=False,
    update=28.0,
)
ALPA = System(
    "Alpa 2021",
    "arXiv 2201.12023 section 8: XLA for GPU with stored scores, collectives waited for",
    attention=None,
    loss=EAGER_LOSS,
    sequence=False,
    rerun=False,
    reduce_overlap=False,
    grad_bytes=2.0,
)
