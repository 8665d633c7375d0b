"""Small modules that several test files build their models from."""

from torch import nn


class Block(nn.Module):
    """A residual MLP of width 8."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(self.a(self.norm(x)).relu())


class Lambda(nn.Module):
    """A model of one function over named layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)
