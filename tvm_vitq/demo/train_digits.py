"""Train the digits model and write what the package carries: weights, test and calibration images.

``python -m tvm_vitq.demo.train_digits`` (needs scikit-learn, one to three minutes on two cores).
Everything is seeded, so a repeated run on the same versions gives the same files.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tvm_vitq.demo import data_file, digits_vit, normalise, pixels

__all__ = ["augment", "main", "split_digits", "train"]

N_TRAIN, N_CALIB = 1200, 128


def split_digits(seed: int = 0) -> dict[str, np.ndarray]:
    """Shuffle scikit-learn's digits and cut them into train, test and calib (a part of train)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    images = bunch.images[order].astype(np.uint8)
    labels = bunch.target[order].astype(np.uint8)
    return {
        "train_images": images[:N_TRAIN],
        "train_labels": labels[:N_TRAIN],
        "test_images": images[N_TRAIN:],
        "test_labels": labels[N_TRAIN:],
        "calib_images": images[:N_CALIB],
        "calib_labels": labels[:N_CALIB],
    }


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shear and shift each image of ``x`` [N, 3, H, W] a little, at random."""
    n = len(x)

    def uniform(bound: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * bound

    angle, shear = uniform(0.21), uniform(0.15)
    zoom_x, zoom_y = 1 + uniform(0.12), 1 + uniform(0.12)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = angle.cos() * zoom_x
    theta[:, 0, 1] = -angle.sin() + shear
    theta[:, 1, 0] = angle.sin()
    theta[:, 1, 1] = angle.cos() * zoom_y
    theta[:, :, 2] = torch.stack([uniform(0.12), uniform(0.12)], dim=1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # The background is -1 after normalisation: shift so that what enters from outside is black.
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train(splits: dict[str, np.ndarray], epochs: int = 80, batch: int = 50) -> torch.nn.Module:
    """Train with AdamW, a cosine schedule and label smoothing; return the average of weights."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(normalise(pixels(splits["train_images"])))
    y = torch.from_numpy(splits["train_labels"].astype(np.int64))
    model = digits_vit(pretrained=False).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    steps = epochs * (len(x) // batch)
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(
            (step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
        ),
    )
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        total = 0.0
        for first in range(0, len(x) - batch + 1, batch):
            index = order[first : first + batch]
            logits = model(augment(x[index], generator))
            loss = F.cross_entropy(logits, y[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            average.update_parameters(model)
            total += loss.item()
        if epoch % 10 == 9:
            right = accuracy(average.module, splits)
            print(f"epoch {epoch + 1:3d}  loss {total / (len(x) // batch):.4f}  test {right:.2f} %")
    return average.module.eval()


def accuracy(model: torch.nn.Module, splits: dict[str, np.ndarray]) -> float:
    """Return the top-1 accuracy on the test split, in percent."""
    x = torch.from_numpy(normalise(pixels(splits["test_images"])))
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        guess = torch.cat([model(part).argmax(-1) for part in x.split(100)]).numpy()
    model.train(was_training)
    return float((guess == splits["test_labels"]).mean() * 100)


def main() -> None:
    """Train, report and write the two files into the package (or ``--into``)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--into", type=Path, default=data_file("digits.npz").parent)
    options = parser.parse_args()
    splits = split_digits()
    model = train(splits, options.epochs)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(state, options.into / "digits_vit.safetensors")
    np.savez_compressed(
        options.into / "digits.npz",
        test_images=splits["test_images"],
        test_labels=splits["test_labels"],
        calib_images=splits["calib_images"],
        calib_labels=splits["calib_labels"],
    )
    print(f"test top-1 {accuracy(model, splits):.2f} %, written to {options.into}")


if __name__ == "__main__":
    main()
