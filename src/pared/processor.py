"""What this machine's processor can do."""

import torch


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; otherwise it is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
