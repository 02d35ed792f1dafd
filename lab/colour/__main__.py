"""Train a base model in colour, in five commands; what trains goes on where it stopped:

    python -m lab.colour prepare --work FOLDER --mirrors FOLDER    cut the pictures
    python -m lab.colour vae --work FOLDER --variant 4x128         train its VAE
    python -m lab.colour latents --work FOLDER --variant 4x128     encode the pictures
    python -m lab.colour unet --work FOLDER --variant 4x128        train its UNet and text encoder
    python -m lab.colour export --work FOLDER --variant 4x128      write all of it as FOLDER/base.safetensors

`--mirrors` has the git directory of each of sources.SOURCES as OWNER+NAME/repo, and `FOLDER/sources/taesd` is a checkout of
madebyollin/taesd. For speed on a CPU, set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to a large number.
"""

import argparse
from pathlib import Path

import torch

from .export import export
from .sources import SOURCES, prepare
from .unet import train_unet, write_latents
from .vae import VARIANTS, train_vae, yardstick


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.colour", description="Trains a base model in colour.")
    parser.add_argument("command", choices=("prepare", "yardstick", "vae", "latents", "unet", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--mirrors", type=Path, help="folder of the sources' git directories")
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--variant", choices=list(VARIANTS), default="4x128")
    parser.add_argument("--minutes", type=float, default=1e9, help="of a processor, in all")
    parser.add_argument("--steps", type=int, default=30000, help="the last step")
    parser.add_argument("--every", type=float, default=30, help="minutes of a processor between reports")
    parser.add_argument("--photos", type=float, default=0.3, help="share of the photographic pictures")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.command == "prepare":
        prepare(given.mirrors, given.work, given.sources)
    elif given.command == "yardstick":
        print(yardstick(given.work, VARIANTS[given.variant][0]))
    elif given.command == "vae":
        train_vae(given.work, given.variant, given.minutes, given.steps, given.every)
    elif given.command == "latents":
        write_latents(given.work, given.variant)
    elif given.command == "export":
        export(given.work, given.variant, given.work / "base.safetensors")
    else:
        train_unet(given.work, given.variant, given.minutes, given.steps, given.every, given.photos)


if __name__ == "__main__":
    main()
