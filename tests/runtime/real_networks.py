"""Networks that are compiled: real ones, small where that changes nothing of what is in them."""

from __future__ import annotations

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
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = double(3, 16), double(16, 32), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.last, self.pool = nn.Sequential(double(32, 16), nn.Conv2d(16, 2, 1)), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        return self.last(torch.cat([a, self.up(self.deep(self.pool(a)))], 1))


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embed(x))


def image(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=7)


def vgg() -> nn.Module:
    net = models.vgg11_bn()
    net.classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return net


def densenet() -> nn.Module:
    """DenseNet-121, with fewer layers in its blocks: torch.export takes half a minute for all of them."""
    return models.DenseNet(32, (3, 4, 4, 3))


def mobilenet_v2() -> nn.Module:
    """With fewer of its blocks, for the same reason."""
    return models.MobileNetV2(
        inverted_residual_setting=[
            [1, 16, 1, 1],
            [6, 24, 2, 2],
            [6, 32, 1, 2],
            [6, 64, 1, 2],
            [6, 96, 1, 1],
            [6, 160, 1, 2],
        ]
    )


def convnext() -> nn.Module:
    """The tiny one, with fewer of its blocks."""
    make = models.convnext.CNBlockConfig
    return models.ConvNeXt([make(96, 192, 1), make(192, 384, 1), make(384, 768, 2), make(768, None, 1)])


def xresnet() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=5)


def fastai_unet() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastai.vision.models.unet import DynamicUnet
    body = nn.Sequential(*list(models.resnet18().children())[:-2])
    return DynamicUnet(body, 3, (64, 64))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet18": (models.resnet18, image),
    "resnet34": (models.resnet34, lambda: image(32)),
    "resnet50": (models.resnet50, image),
    "mobilenet_v2": (mobilenet_v2, image),
    "mobilenet_v3": (models.mobilenet_v3_small, image),
    "efficientnet_b0": (models.efficientnet_b0, image),
    "densenet121": (densenet, image),
    "vgg11_bn": (vgg, lambda: image(32)),
    "convnext_tiny": (convnext, image),
    "vit": (vit, lambda: image(32)),
    "unet": (UNet, lambda: image(32)),
    "bert": (Bert, lambda: torch.randint(0, 50, (2, 12))),
    "xresnet": (xresnet, lambda: image(32)),
    "fastai_unet": (fastai_unet, image),
}


def made(name: str) -> nn.Module:
    """With numbers in it that folding has something to do with, and heads that do not give zeros only."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def sparse_model(name: str, sparsity: float) -> nn.Module:
    model = made(name)
    if sparsity:
        Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(sparsity)
    return model


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())
