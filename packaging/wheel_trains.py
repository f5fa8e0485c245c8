"""What a wheel must do where nothing but Python, torch and the wheel is (try_wheel.py): sparsify, train, save, load."""

import shutil
import subprocess
import sys
from pathlib import Path

site = Path(sys.argv[1])
for tool in ("cc", "gcc", "g++", "c++", "clang", "cmake", "ninja", "nvcc", "make"):
    assert shutil.which(tool) is None, f"the environment has {tool}"

import torch  # noqa: E402
from torch import nn  # noqa: E402

import sparse24  # noqa: E402


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


assert Path(sparse24.__file__).parent == site / "sparse24", f"not of the wheel: {sparse24.__file__}"
assert (site / "sparse24" / "include" / "sparse24").is_dir(), "the C++ headers are missing"
torch.manual_seed(0)
model = FeedForward()
report = sparse24.sparsify(model)
assert report.converted == ["fc1", "fc2"], str(report)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
recipe = sparse24.Recipe(model, optimizer, total_steps=20, decay=1e-4)
x = torch.randn(128, 64)
losses = []
for _ in range(20):
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
folder = sparse24.save_checkpoint(Path.cwd() / "run", model, optimizer, recipe)
sparse24.load_checkpoint(folder, model, optimizer, recipe)
told = subprocess.run([sys.executable, "-I", "-m", "sparse24", "env"], capture_output=True, text=True)
assert told.returncode and "pip install 'sparse24[train]'" in told.stderr, told.stdout + told.stderr  # and no traceback
assert "Traceback" not in told.stderr, told.stderr
print(f"20 steps of two 2:4 layers, loss {losses[0]:.2f} to {losses[-1]:.2f}")
