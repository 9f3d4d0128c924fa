"""Entry points of `torch.hub`:

model, transform = torch.hub.load(CHECKOUT, "load_encoder", "output/mine", source="local")
model = torch.hub.load(CHECKOUT, "build", "nor_mae", "mae_vit_tiny_patch16", source="local")

`torch.hub.load` has a parameter `model` itself, so that of `build` is given by position.
"""

from methods import build
from tools.encoder import load_encoder

__all__ = ["build", "load_encoder"]

dependencies = ["numpy", "PIL", "timm", "torch", "torchcodec", "torchvision", "yaml"]
