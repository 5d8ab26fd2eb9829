"""What a GPU and its links are taken to reach: the assumptions behind every estimated time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from step37_lit.errors import require


@dataclass(frozen=True)
class Hardware:
    """A GPU, its node and its network.

    Args:
        name: What the figures belong to.
        memory_gb: Of a GPU, in GB (1e9 bytes).
        reserved_gb: Of it not for the model: CUDA context, NCCL's buffers, fragments of the allocator.
        peak_tflops: Dense matrix products in the model's dtype, TFLOP/s.
        achieved: Share of the peak that the model's matrix products and attention reach while they run.
        memory_bandwidth: GB/s between a GPU and its memory.
        node_bandwidth: GB/s that a GPU sends to others of its node, one way.
        network_bandwidth: GB/s that a GPU sends to other nodes, one way.
        link_efficiency: Share of both bandwidths that collectives reach.
        gpus_per_node: GPUs that share the faster links.
    """

    name: str = "H100"
    memory_gb: float = 80.0
    reserved_gb: float = 6.0
    peak_tflops: float = 989.0
    achieved: float = 0.5
    memory_bandwidth: float = 3350.0
    node_bandwidth: float = 450.0
    network_bandwidth: float = 50.0
    link_efficiency: float = 0.75
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("achieved", "link_efficiency"):
                require(0 < value <= 1, f"--{field.name.replace('_', '-')}", "in (0, 1]", value)
            elif field.name == "reserved_gb":
                require(0 <= value < self.memory_gb, "--reserved-gb", f"in 0..{self.memory_gb:g}", value)
            elif field.name != "name":
                require(value > 0, f"--{field.name.replace('_', '-')}", "a positive number", value)

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gb - self.reserved_gb) * 1e9

    @property
    def flops_per_second(self) -> float:
        return self.peak_tflops * 1e12 * self.achieved

    def link_seconds(self, sent: float, size: int, stride: int, all_to_all: bool = False) -> float:
        """Time of a collective in which each rank sends `sent` bytes.

        Args:
            sent: Bytes from each rank, to all others together.
            size: Ranks of the group.
            stride: Distance of neighbouring ranks of the group, in ranks.
            all_to_all: Every pair exchanges; else a ring, of which a node's members carry the crossing together.
        """
        if size == 1 or sent == 0:
            return 0.0
        node, network = (
            bandwidth * 1e9 * self.link_efficiency for bandwidth in (self.node_bandwidth, self.network_bandwidth)
        )
        together = min(size, max(1, self.gpus_per_node // stride))  # members of the group on one node
        if together == size:
            return sent / node
        if all_to_all:
            outside = sent * (size - together) / (size - 1)
            return max((sent - outside) / node, outside / network)
        return max(sent / node if together > 1 else 0.0, sent / together / network)


# Vendors' data sheets: H100 SXM5, H200 SXM (dense bf16, NVLink 4 900 GB/s both ways), one 400 Gb/s port a GPU.
HARDWARE = {
    "h100": Hardware(),
    "h200": Hardware(name="H200", memory_gb=141.0, memory_bandwidth=4800.0),
}
