"""The networks that pruning is tested on: random weights, and statistics that are none of the defaults."""

from __future__ import annotations

import torch
import torchvision.models as zoo
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Two steps down, two up, with what was seen on the way down joined in (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 8), block(8, 16), block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join2, self.join1, self.head = block(32, 16), block(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        up = self.up2(self.bottom(F.max_pool2d(two, 2)))
        up = self.up1(self.join2(torch.cat([up, two], 1)))
        return self.head(self.join1(torch.cat([up, one], 1)))


def block(i: int, o: int) -> nn.Sequential:
    def half(i: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]

    return nn.Sequential(*half(i), *half(o))


class Attention(nn.Module):
    """As many libraries write it: one projection for queries, keys and values."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class SelfAttention(nn.Module):
    """As others do: three projections, and their common width in an attribute."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, width // heads, width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        heads = (b, n, self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.dense(mixed.reshape(b, n, self.all_head_size))


class Transformer(nn.Module):
    """One block between an embedding and a head."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 2)
        self.norm1, self.norm2, self.attention = nn.LayerNorm(16), nn.LayerNorm(16), attention()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))


class Grouped(nn.Module):
    """A convolution in four groups between two plain ones, and a normalisation in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=4)
        self.norm, self.conv3 = nn.GroupNorm(2, 24), nn.Conv2d(24, 2, 1)

    def forward(self, x):
        return self.conv3(self.norm(self.conv2(F.relu(self.conv1(x)))))


class Gated(nn.Module):
    """One half of a layer's channels multiplies the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        a, b = self.conv1(x).chunk(2, 1)
        return self.conv2(a * torch.sigmoid(b))


NETWORKS = {
    "resnet18": (zoo.resnet18, 32),
    "resnet50": (zoo.resnet50, 32),
    "mobilenet_v2": (zoo.mobilenet_v2, 32),
    "mobilenet_v3": (zoo.mobilenet_v3_large, 32),
    "efficientnet_b0": (zoo.efficientnet_b0, 32),
    "densenet121": (zoo.densenet121, 32),
    "vgg16_bn": (zoo.vgg16_bn, 32),
    "convnext_tiny": (zoo.convnext_tiny, 32),
    "vit_b_16": (lambda: zoo.vit_b_16(image_size=32), 32),
    "unet": (UNet, 16),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network as if it had been trained, and a batch that it takes."""
    torch.manual_seed(0)
    builder, pixels = NETWORKS[name]
    return seasoned(builder()), torch.rand(2, 3, pixels, pixels)


@torch.no_grad()
def seasoned(model: nn.Module) -> nn.Module:
    """Statistics, shifts and biases that are not what they begin with, since 0 and 1 hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.bias is not None:
            module.bias.normal_(std=0.1)
    return model.eval()
