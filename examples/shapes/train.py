"""Trains the shapes demo: a small VAE, then a class-conditional DiT on its latents, saved as a DiTPipeline.

examples:
  python examples/shapes/train.py                      the real thing: the times are in README.md
  python examples/shapes/train.py --images 480 --vae-steps 20 --dit-steps 20 --out smoke_model
                                                       does it run at all: under a minute, pictures are noise
  python examples/shapes/train.py --vae examples/shapes/model/vae --out other_model
                                                       keep a trained VAE, train only the DiT
  python examples/shapes/train.py --vae examples/shapes/model/vae --dit examples/shapes/model/transformer \\
      --dit-steps 8000 --dit-lr 1e-3 --seed 1          train the DiT that is there for longer
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from data import IMAGE_SIZE, LABELS, draw_dataset
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

log = logging.getLogger("train")

NULL_LABEL = 1000  # DiTPipeline writes this number as "no class" in its guidance, whatever the model
CLASS_DROPOUT = 0.1  # the share of training pictures whose class is hidden, for classifier-free guidance
EMA_DECAY = 0.999
KL_WEIGHT = 3e-5  # small: at 1e-3 two of the four latent channels went unused and corners came out round


def build_vae() -> AutoencoderKL:
    """A VAE from (batch, 3, 64, 64) pictures in -1..1 to (batch, 4, 16, 16) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_dit() -> DiTTransformer2DModel:
    """A DiT from (batch, 4, 16, 16) latents to (batch, 4, 16, 16); inside they are 8 x 8 = 64 tokens."""
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=2,
        # The model adds one row for "no class" after these, so that row is number 1000 = NULL_LABEL.
        num_embeds_ada_norm=NULL_LABEL,
    )
    # adaLN-Zero, as in the DiT paper: every block starts as the identity and the output starts at zero.
    for block in dit.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        nn.init.zeros_(table)  # the rows of labels that do not exist stay zero for good
        nn.init.normal_(table[: len(LABELS)], std=0.02)
    nn.init.zeros_(dit.proj_out_2.weight)
    nn.init.zeros_(dit.proj_out_2.bias)
    return dit


def build_scheduler() -> DDIMScheduler:
    """DDIM on a cosine schedule with v-prediction, which is well-behaved from pure noise to clean."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def batches(count: int, batch_size: int) -> Iterator[Tensor]:
    """Endless index batches (batch_size,) that go through all `count` items in a new order each time."""
    whole = count // batch_size * batch_size
    while True:
        yield from torch.randperm(count)[:whole].split(batch_size)


def optimizer_for(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW with a short warm-up and a cosine decay to zero over `steps`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    warmup = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizer, LambdaLR(optimizer, factor)


def descend(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
    """One optimizer step down a scalar loss."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


class RunningMean:
    """The mean of the latest `window` values: a loss that can be read off a progress bar."""

    def __init__(self, window: int = 200) -> None:
        self.window = window
        self.values: list[float] = []

    def add(self, value: float) -> float:
        """Takes one more value in and returns the mean."""
        self.values = [*self.values[1 - self.window :], value]
        return self.value

    @property
    def value(self) -> float:
        """The mean so far (nan before the first value)."""
        return sum(self.values) / len(self.values) if self.values else math.nan


def progress(steps: int, name: str) -> Iterable[int]:
    """A tqdm bar over range(steps) that does not flood a log file."""
    return tqdm(range(steps), desc=name, unit="step", mininterval=2.0)


def reconstruction_losses(decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute error of pictures (batch, 3, 64, 64), and of the steps between neighbouring pixels.

    The second is about edges alone: it is what makes corners sharp and flat areas flat.
    """
    error = decoded - images
    return error.abs().mean(), error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def train_vae(images: Tensor, steps: int, batch_size: int, lr: float) -> AutoencoderKL:
    """Trains the VAE on images (count, 3, 64, 64) in -1..1; its scaling_factor is set by `standardize`."""
    vae = build_vae().train()
    optimizer, schedule = optimizer_for(vae, lr, steps)
    order = batches(len(images), batch_size)
    mean_l1 = RunningMean()
    bar = progress(steps, "vae")
    for _ in bar:
        batch = images[next(order)]
        with torch.autocast("cpu", dtype=torch.bfloat16):  # twice as fast on CPUs that have bf16
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        l1, edges = reconstruction_losses(decoded.float(), batch)
        kl = -0.5 * (1 + posterior.logvar - posterior.mean**2 - posterior.var).float().mean()
        descend(vae, l1 + edges + KL_WEIGHT * kl, optimizer, schedule)
        bar.set_postfix(l1=f"{mean_l1.add(l1.item()):.4f}", edges=f"{edges.item():.4f}", update_and_read=False)
    log.info("vae: final L1 %.4f on pixels in -1..1 (mean of the last 200 steps)", mean_l1.value)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every picture's latent, unscaled: two of (count, 4, 16, 16)."""
    means, stds = [], []
    for batch in tqdm(images.split(64), desc="encode", unit="batch"):
        posterior = vae.encode(batch).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def standardize(vae: AutoencoderKL, images: Tensor) -> None:
    """Makes the latents of images (count, 3, 64, 64) zero-mean, and sets scaling_factor to make their std 1.

    DiTPipeline multiplies by a scaling_factor but knows no shift, so the shift goes into the biases of the
    1x1 convolutions on both sides of the latent, which leaves the VAE as a whole unchanged.
    """
    means, _ = encode(vae, images)
    shift = means.mean(dim=(0, 2, 3))  # (4,)
    vae.quant_conv.bias[: len(shift)] -= shift  # the other half of its outputs are the log variances
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    std = (means - shift[:, None, None]).std().item()
    vae.register_to_config(scaling_factor=1.0 / std)


def update_ema(ema: nn.Module, model: nn.Module, step: int) -> None:
    """Moves the averaged weights towards the model's; early on faster, so they forget the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train_dit(
    dit: DiTTransformer2DModel,
    means: Tensor,
    stds: Tensor,
    labels: Tensor,
    steps: int,
    batch_size: int,
    lr: float,
) -> DiTTransformer2DModel:
    """Trains on scaled latents, means and stds (count, 4, 16, 16), with labels (count,); returns the EMA."""
    # eval() on purpose: in training mode each block would drop the class on its own, by its own coin, and
    # the blocks would hardly ever all see "no class" together. The class is dropped here instead.
    dit.eval()
    ema = copy.deepcopy(dit).requires_grad_(False)
    scheduler = build_scheduler()
    optimizer, schedule = optimizer_for(dit, lr, steps)
    order = batches(len(means), batch_size)
    mean_mse = RunningMean()
    bar = progress(steps, "dit")
    for step in bar:
        index = next(order)
        latents = means[index] + stds[index] * torch.randn(means[index].shape)
        noise = torch.randn(latents.shape)
        # One timestep from each of batch_size equal slices of the schedule: less spread than free draws.
        slices = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
        timesteps = (slices * scheduler.config.num_train_timesteps).long()
        hidden = torch.rand(batch_size) < CLASS_DROPOUT
        classes = torch.where(hidden, NULL_LABEL, labels[index])

        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = dit(noisy, timestep=timesteps, class_labels=classes).sample
        mse = F.mse_loss(predicted.float(), target)
        descend(dit, mse, optimizer, schedule)
        update_ema(ema, dit, step)
        bar.set_postfix(mse=f"{mean_mse.add(mse.item()):.4f}", update_and_read=False)
    log.info("dit: final mean squared error of v %.4f (mean of the last 200 steps)", mean_mse.value)
    return ema


def load_vae(path: Path) -> AutoencoderKL:
    """The trained VAE in a directory, put into a new model so that its config does not remember the path."""
    stored = AutoencoderKL.from_pretrained(path)
    vae = build_vae().eval()
    vae.load_state_dict(stored.state_dict())
    vae.register_to_config(scaling_factor=stored.config.scaling_factor)
    return vae


def load_dit(path: Path) -> DiTTransformer2DModel:
    """The trained DiT in a directory, put into a new model as in `load_vae`."""
    dit = build_dit()
    dit.load_state_dict(DiTTransformer2DModel.from_pretrained(path).state_dict())
    return dit


def save_pipeline(dit: DiTTransformer2DModel, vae: AutoencoderKL, out: Path) -> None:
    """Writes the pipeline directory `out`, whole or not at all; an older one there is replaced.

    Weights are stored as float16 to halve the files; from_pretrained gives them back as float32.
    """
    pipe = DiTPipeline(transformer=dit.half(), vae=vae.half(), scheduler=build_scheduler())
    # DiTPipeline reads id2label from model_index.json but does not write it there by itself.
    pipe.register_to_config(id2label={str(number): label for number, label in enumerate(LABELS)})
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        pipe.save_pretrained(scratch / "new")
        for weights in scratch.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes files that only their owner can read
        if out.exists():
            out.rename(scratch / "old")
        try:
            (scratch / "new").rename(out)
        except OSError:
            if (scratch / "old").exists():
                (scratch / "old").rename(out)
            raise
    finally:
        shutil.rmtree(scratch)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument(
        "--out",
        type=Path,
        default=here / "model",
        help="pipeline directory to write (default: model/ beside this script)",
    )
    parser.add_argument("--vae", type=Path, help="use this trained VAE directory instead of training one")
    parser.add_argument("--dit", type=Path, help="start from this trained DiT directory (needs --vae)")
    parser.add_argument("--images", type=int, default=24000, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--vae-batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--vae-lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--dit-steps", type=int, default=3200, help="default: %(default)s")
    parser.add_argument("--dit-batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--dit-lr", type=float, default=1.5e-3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    if args.dit and not args.vae:
        parser.error("--dit needs --vae: a DiT understands the latents of its own VAE only")
    return args


def main() -> None:
    """Draws, trains, saves."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)

    began = time.perf_counter()
    pixels, numbers = draw_dataset(args.images, args.seed)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(numbers)
    log.info("drew %d pictures: %.0f s", len(images), time.perf_counter() - began)

    if args.vae:
        vae = load_vae(args.vae)
    else:
        began = time.perf_counter()
        torch.manual_seed(args.seed)
        vae = train_vae(images, args.vae_steps, args.vae_batch, args.vae_lr)
        standardize(vae, images[:2048])
        vae = vae.half().float()  # it is stored as float16: let the DiT learn the latents of the stored one
        log.info("vae: %.0f s", time.perf_counter() - began)

    began = time.perf_counter()
    torch.manual_seed(args.seed)  # again, so that the DiT comes out the same with and without --vae
    means, stds = encode(vae, images)
    scale = vae.config.scaling_factor
    start = load_dit(args.dit) if args.dit else build_dit()
    dit = train_dit(start, scale * means, scale * stds, labels, args.dit_steps, args.dit_batch, args.dit_lr)
    log.info("dit: %.0f s", time.perf_counter() - began)

    save_pipeline(dit, vae, args.out)
    counts = {
        name: sum(p.numel() for p in module.parameters()) for name, module in (("dit", dit), ("vae", vae))
    }
    log.info("saved %s, parameters %s", args.out, json.dumps(counts))


if __name__ == "__main__":
    main()
