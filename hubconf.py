"""Entry points of `torch.hub`:

model, transform = torch.hub.load(CHECKOUT, "load_encoder", "output/mine", source="local")
model = torch.hub.load(CHECKOUT, "build", "nor_mae", source="local", model="mae_vit_tiny_patch16")
"""

from methods import build
from tools.encoder import load_encoder

__all__ = ["build", "load_encoder"]

dependencies = ["numpy", "PIL", "timm", "torch", "torchcodec", "torchvision", "yaml"]
