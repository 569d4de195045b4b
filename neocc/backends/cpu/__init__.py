"""A mesh of host devices: the same programs and collectives in one process, without a chip."""

from neocc.backends.base import Backend
from neocc.backends.cpu.host import described_hosts, host_devices

BACKEND = Backend(kind="cpu", describe=described_hosts, start=host_devices)
