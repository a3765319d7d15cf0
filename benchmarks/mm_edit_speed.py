"""Measures MM-EDiT's speed on the full SD3.5-Medium configuration (random weights, bfloat16).

    python benchmarks/mm_edit_speed.py            # blocks to 2048 pixels, model to 2048
    python benchmarks/mm_edit_speed.py --quick    # blocks only

Writes the claims and tables into results/mm-edit.json.
"""

import argparse

import speed

import pared

PRESET = "sd3.5-medium"
ARMS = {
    "softmax": [],
    "mm-edit": [pared.MMEDiT()],
    "mm-edit:r=8": [pared.MMEDiT(r=8)],
    "sana": [pared.Sana()],
    "clear:r=8": [pared.Clear(r=8)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="blocks only")
    parser.add_argument("--rounds", type=int, default=3, help="of blocks")
    parser.add_argument("--device", default="cpu", help="cuda makes tables of its own")
    options = parser.parse_args()
    if options.device != "cpu":
        speed.on_accelerator("mm-edit", PRESET, ARMS, [512, 1024, 2048, 4096], options.device)
        return
    speed.blocks("mm-edit", PRESET, ARMS, [512, 1024, 2048], options.rounds)
    if not options.quick:
        speed.whole_model("mm-edit", PRESET, ARMS["mm-edit"], 1024, 2, "speedup-1024")
        speed.whole_model("mm-edit", PRESET, ARMS["mm-edit"], 2048, 1)


if __name__ == "__main__":
    main()
