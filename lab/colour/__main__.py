"""Train a base model in colour, in five commands; what trains goes on where it stopped:

    python -m lab.colour prepare --work FOLDER --mirrors FOLDER       cut the pictures
    python -m lab.colour vae --work FOLDER                            train its VAE
    python -m lab.colour latents --work FOLDER                        encode the pictures
    python -m lab.colour unet --work FOLDER                           train its UNet and text encoder
    python -m lab.colour export --work FOLDER                         write all of it as FOLDER/base.safetensors

`--mirrors` has the git directory of each of sources.SOURCES as OWNER+NAME/repo, and `FOLDER/sources/taesd` is a checkout of
madebyollin/taesd. On a CPU, jemalloc by LD_PRELOAD and OMP_WAIT_POLICY=active together halve the time of a step.
"""

import argparse
from pathlib import Path

import torch

from .export import export
from .sources import SOURCES, prepare
from .unet import train_unet, write_latents
from .vae import train_vae, yardstick


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.colour", description="Trains a base model in colour.")
    parser.add_argument("command", choices=("prepare", "yardstick", "vae", "latents", "unet", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--mirrors", type=Path, help="folder of the sources' git directories")
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument(
        "--start", type=Path, help="a base model to go on from, at the first command of latents and of unet"
    )
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
        print(yardstick(given.work))
    elif given.command == "vae":
        train_vae(given.work, given.minutes, given.steps, given.every)
    elif given.command == "latents":
        write_latents(given.work, given.start)
    elif given.command == "export":
        export(given.work, given.work / "base.safetensors")
    else:
        train_unet(given.work, given.start, given.minutes, given.steps, given.every, given.photos)


if __name__ == "__main__":
    main()
