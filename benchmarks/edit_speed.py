"""Measures EDiT's speed claims on the full PixArt-Sigma configuration (random weights, bfloat16).

    python benchmarks/edit_speed.py            # blocks to 4096 pixels, model to 2048: half an hour
    python benchmarks/edit_speed.py --quick    # blocks to 2048 only: minutes

Writes the claims and the scaling table with its fitted exponents into results/edit.json.
"""

import argparse

import speed

import pared

PRESET = "pixart-sigma"
ARMS = {
    "softmax": [],
    "edit": [pared.EDiT()],
    "edit:r=8": [pared.EDiT(r=8)],
    "sana": [pared.Sana()],
    "linfusion": [pared.LinFusion()],
    "kv-compression": [pared.KVCompression()],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="blocks up to 2048 only")
    parser.add_argument("--rounds", type=int, default=3, help="of blocks up to 2048 pixels")
    parser.add_argument("--device", default="cpu", help="cuda makes tables of its own")
    options = parser.parse_args()
    if options.device != "cpu":
        speed.on_accelerator("edit", PRESET, ARMS, [512, 1024, 2048, 4096], options.device)
        return
    if options.quick:
        speed.blocks("edit", PRESET, ARMS, [512, 1024, 2048], options.rounds)
        return
    sizes = [512, 1024, 2048, 4096]
    speed.blocks("edit", PRESET, ARMS, sizes, options.rounds, "speedup-4096")
    speed.whole_model("edit", PRESET, ARMS["edit"], 1024, 4, "speedup-1024")
    speed.whole_model("edit", PRESET, ARMS["edit"], 2048, 1, "speedup-2048")


if __name__ == "__main__":
    main()
