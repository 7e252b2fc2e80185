"""Networks that are compiled: the real ones, with random weights, for small images."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision import models

from gossamer import Sparsifier


def double(i: int, o: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al. 2015, with padding and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 128, 256, 512, 1024)
        steps = list(itertools.pairwise(sizes))
        self.first = double(3, sizes[0])
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), double(i, o)) for i, o in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, stride=2) for i, o in reversed(steps))
        self.after = nn.ModuleList(double(o, i) for i, o in reversed(steps))
        self.last = nn.Conv2d(sizes[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.first(x)]
        for down in self.down:
            seen.append(down(seen[-1]))
        x = seen.pop()
        for up, after in zip(self.up, self.after, strict=True):
            x = after(torch.cat([seen.pop(), up(x)], 1))
        return self.last(x)


class Bert(nn.Module):
    """The encoder of BERT-base, its embeddings and all."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(30522, 768), nn.Embedding(512, 768), nn.LayerNorm(768, 1e-12)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True, layer_norm_eps=1e-12)
        self.encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.encoder(self.norm(self.words(x) + self.places(places)))


def image(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size)


def vit() -> nn.Module:
    """ViT-B/16; small images have fewer patches, and meet the same layers."""
    return models.vit_b_16(image_size=64)


def xresnet() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastai.vision.models.xresnet import xresnet50
    return xresnet50(n_out=10)


def fastai_learner() -> nn.Module:
    """As `vision_learner` makes it: an xresnet's body, and fastai's head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastai.vision.learner import create_vision_model
        from fastai.vision.models.xresnet import xresnet34
    return create_vision_model(xresnet34, 10, pretrained=False)


def fastai_unet() -> nn.Module:
    """As `unet_learner` makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastai.vision.learner import create_unet_model
    return create_unet_model(models.resnet34, 3, (64, 64), pretrained=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet18": (models.resnet18, image),
    "resnet34": (models.resnet34, image),
    "resnet50": (models.resnet50, image),
    "mobilenet_v2": (models.mobilenet_v2, image),
    "mobilenet_v3_small": (models.mobilenet_v3_small, image),
    "mobilenet_v3_large": (models.mobilenet_v3_large, image),
    "efficientnet_b0": (models.efficientnet_b0, image),
    "densenet121": (models.densenet121, image),
    "vgg16_bn": (models.vgg16_bn, lambda: image(32)),
    "convnext_tiny": (models.convnext_tiny, image),
    "vit_b_16": (vit, image),
    "unet": (UNet, image),
    "bert_base": (Bert, lambda: torch.randint(0, 30522, (1, 32))),
    "xresnet50": (xresnet, image),
    "fastai_learner": (fastai_learner, image),
    "fastai_unet": (fastai_unet, image),
}


def made(name: str) -> nn.Module:
    """With numbers in it that folding has something to do with, and heads that do not give zeros only."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.1)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
    return model


def sparse_model(name: str, sparsity: float) -> nn.Module:
    model = made(name)
    if sparsity:
        Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(sparsity)
    return model


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    largest = float(want.abs().max())  # nothing at all where all of a head without biases is zero
    return float((got - want).abs().max()) / (largest or 1.0)
