"""What training systems do beside their stated plan: which transfers run behind compute, which
kernels are fused. Facts of a system and its time, each with a source; nothing here is fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class System:
    """source: where the facts are from.

    attention: rate of the products in its fused attention kernel, as a share of a large product's
    (exponentials come on top); None where scores are stored and its products are priced like any other; dropout: between softmax and values, a kernel of its
    own; sequence: tensor parallelism comes with sequence parallelism. rerun: recomputation runs the
    whole forward pass again, its collectives included (a compiler drops what only the output
    needs). tensor_overlap: share of the tensor axis' transfers that can run behind products;
    reduce_overlap: gradients are reduced, and updated parameters gathered, behind compute; sharded:
    each data replica updates its share (ZeRO-1). grad_bytes: of a gradient that is sent;
    accumulate: bytes moved per weight and microbatch to add a gradient up outside of its product.
    send_overlap: pipeline sends run behind compute; sends_cut: each tensor parallel device sends
    its share. narrow_gathers: activations are gathered in the products' narrow dtype;
    cast_weights: bytes moved to cast an element of a weight before each product in a narrow dtype
    (systems that cast once a step: 0). bucketed: a layer's weights travel as one; regather: once more for recomputation
    than for the gradients; copies: bytes moved in memory for each byte gathered or scattered, on its
    way between the tensors and the communication library's flat buffer; weight_overlap: share of weight gathers and
    gradient reductions that can run behind compute. update: bytes moved per parameter by Adam.
    loss: bytes moved per logit by the kernels of a loss that is not fused (f32 logits made, maximum,
    difference, exponential, sum, quotient, and the gradient: about ten passes of 4).
    host: seconds that launching one kernel takes the host, which bounds small layers.
    """

    name: str
    source: str
    attention: float | None = 1.0
    dropout: bool = False
    sequence: bool = True
    rerun: bool = True
    tensor_overlap: float = 0.0
    reduce_overlap: bool = True
    sharded: bool = True
    grad_bytes: float = 4.0
    accumulate: float = 0.0
    send_overlap: bool = False
    sends_cut: bool = True
    narrow_gathers: bool = False
    cast_weights: float = 0.0
    bucketed: bool = True
    regather: bool = False
    copies: float = 0.0
    weight_overlap: float = 0.9
    update: float = 40.0
    loss: float = 0.0
    host: float = 0.0


# A gather or scatter that is cut into steps between those of a product leaves its first or last step
# waited for: of a ring of 8, one eighth, and half the products have both neighbours exposed.
RING = 0.8

MEGATRON_2021 = System(
    "Megatron-LM 2021",
    "arXiv 2104.04473: fused softmax over stored scores, all-reduces of tensor and data parallelism"
    " waited for, scatter/gather of pipeline sends (sections 4.1, 4.2); fp16 gradients, added up in"
    " a buffer of their own (DDP-impl local)",
    attention=None,
    loss=40.0,
    dropout=True,
    sequence=False,
    reduce_overlap=False,
    sharded=False,
    grad_bytes=2.0,
    accumulate=6.0,
    update=50.0,
)
MEGATRON_2022 = System(
    "Megatron-LM 2022",
    "arXiv 2205.05198: sequence parallelism, scores stored, selective recomputation; one replica",
    attention=None,
    loss=40.0,
    dropout=True,
    reduce_overlap=False,
    sharded=False,
    update=50.0,
)
ZERO_3 = System(
    "DeepSpeed ZeRO-3 2021",
    "arXiv 2104.04473 section 5.2; arXiv 2104.07857 section 4.1: parameters are loaded for the forward"
    " pass, for its recomputation and for the gradients. DeepSpeed 0.3 gathers each parameter, and"
    " scatters its gradient, by a collective of its own, small ones excepted, and waits;"
    " torch.distributed.all_gather and reduce_scatter of lists copy to and from a flat buffer",
    attention=None,
    loss=40.0,
    dropout=True,
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
    " distributed optimizer, gradients accumulated in f32, loss not fused; Transformer Engine of its time"
    " preferred FlashAttention-2, 35 % of the peak of an H100 (arXiv 2407.08608, abstract)",
    attention=0.5,
    loss=40.0,
    tensor_overlap=RING,
    send_overlap=True,
)
BRIDGE = System(
    "Megatron Bridge",
    "Megatron Bridge performance guide and scripts/performance: as Megatron-Core, userbuffers for"
    " tensor parallelism, Megatron FSDP with one bucket a layer, no recomputation (activations"
    " offloaded to the CPU on GB200 and GB300), fused loss; attention by cuDNN (arXiv 2407.08608)",
    tensor_overlap=RING,
    send_overlap=True,
)
TORCHTITAN = System(
    "torchtitan",
    "torchtitan benchmarks, December 2024: FSDP2 prefetches a layer ahead, sequence parallelism,"
    " torch.compile; tensor parallel collectives waited for; attention by PyTorch's own kernel, which"
    " is FlashAttention-2: 35 % of the peak of an H100 (arXiv 2407.08608, abstract), where large products"
    " reach 70; recomputation stops at the last tensor that is needed (torch.utils.checkpoint,"
    " early_stop); tensorwise float8 gathers float8",
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
    " attention; optimizer state sharded with the weights. Layers are a scan, whose stacked gradients"
    " are reduced over slices when it has ended. AQT and Qwix scale by maxima of rows and columns, of"
    " activations and of gathered weights, at each product",
    rerun=False,
    attention=0.7,
    reduce_overlap=False,
    cast_weights=5.0,
    tensor_overlap=RING,
    grad_bytes=4.0,
    bucketed=False,
    update=28.0,
)
ALPA = System(
    "Alpa 2021",
    "arXiv 2201.12023 section 8: XLA for GPU with stored scores, collectives waited for",
    attention=None,
    loss=40.0,
    sequence=False,
    rerun=False,
    reduce_overlap=False,
    grad_bytes=2.0,
    update=40.0,
)
