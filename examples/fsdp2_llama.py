"""A Llama of any size under FSDP2, with feed-forward layers dense or 2:4, on real tokens; from 1 to N GPUs, or CPUs.

    torchrun --nproc-per-node 8 examples/fsdp2_llama.py --size 8b --arm 2:4 --compile --out runs/8b
    torchrun --nproc-per-node 2 examples/fsdp2_llama.py --size 8b --layers 8 --arm 2:4-fp8-hybrid --compile
    torchrun --nproc-per-node 2 examples/fsdp2_llama.py --size tiny --steps 20        # a laptop

Weights are fp32 and sharded, products bf16. Text is that of `python -m sparse24 pretrain`, from the same cache of
tokens. `--out` keeps checkpoints of torch.distributed.checkpoint; the same command with `--resume` goes on from the
last one, with another number of GPUs if you like.
"""

import argparse
import math
import os
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sparse24
from sparse24.pretrain.settings import Settings, resolve
from sparse24.pretrain.tokens import Batches, prepare

ARMS = ("dense", "fp8-tensorwise", "fp8-rowwise", "2:4", "2:4-fp8-hybrid", "2:4-fp8")
PEAK = {"H100": 989e12, "H200": 989e12, "GH200": 989e12}  # dense bf16 FLOP/s


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int  # of the feed-forward layers
    vocab: int
    length: int  # tokens of a sequence

    def flops(self, tokens: int) -> float:
        """Of forward and backward, all products counted as dense; causal attention over half of the square."""
        attention = 2 * self.width**2 * (1 + self.kv_heads / self.heads)
        weights = self.layers * (attention + 3 * self.width * self.hidden) + self.vocab * self.width
        return tokens * 6.0 * (weights + self.layers * self.width * self.length)


SHAPES = {
    "tiny": Shape(2, 64, 4, 2, 128, 512, 64),
    "1b": Shape(16, 2048, 32, 8, 8192, 128256, 8192),
    "3b": Shape(28, 3072, 24, 8, 8192, 128256, 8192),
    "8b": Shape(32, 4096, 32, 8, 14336, 128256, 8192),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, shape.width // shape.heads
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x, cos, sin):
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = ((t * cos + torch.cat([-t[..., self.size // 2 :], t[..., : self.size // 2]], -1) * sin) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(shape.width, eps=1e-5), nn.RMSNorm(shape.width, eps=1e-5)
        self.attention, self.ffn = Attention(shape), FeedForward(shape)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """ids, targets [batch, length] -> mean cross-entropy."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        self.register_buffer("angles", torch.empty(shape.length, shape.width // shape.heads), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Also of a model that was made on the meta device and sharded."""
        size = self.shape.width // self.shape.heads
        frequencies = 500_000.0 ** (-torch.arange(0, size, 2, device=self.angles.device) / size)
        positions = torch.arange(self.shape.length, device=self.angles.device)
        self.angles.copy_(torch.outer(positions, frequencies).repeat(1, 2))
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            else:
                residual = name.endswith(("out.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * self.shape.layers) if residual else 1.0))

    def forward(self, ids, targets):
        x = self.embedding(ids)
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


# -- from an arm to a sharded model -----------------------------------------------------------------------------------


def convert(model: nn.Module, arm: str) -> None:
    """Change the layers that the arm changes; the head stays as it is in all of them."""
    if arm.startswith("2:4"):
        report = sparse24.sparsify(model, backend="sparse", precision=arm[4:] or None)
        if dist.get_rank() == 0:
            print(report)
    elif arm.startswith("fp8"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        if arm == "fp8-tensorwise":
            config = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        else:
            config = Float8LinearConfig.from_recipe_name("rowwise")
        convert_to_float8_training(model.blocks, config=config)


def build(args, shape: Shape, device: torch.device) -> nn.Module:
    """Convert, compile, shard, and only then make weights: no rank ever holds all of them."""
    with torch.device("meta"):
        model = Llama(shape)
    convert(model, args.arm)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        if args.compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    torch.manual_seed(args.seed)
    model.init_weights()
    return model


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, model, optimizer, recipe) -> None:
    """Into a folder of its own; `latest` names it when all of it is there."""
    path, rank = folder / f"step-{step}", dist.get_rank()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)
    state = recipe.state_dict() if recipe else {}  # on all ranks: masks may have to be gathered
    if rank == 0:
        torch.save({"step": step, "recipe": state}, path / "training.pt")
    torch.save(state.get("rng", {}), path / f"rng-{rank}-of-{dist.get_world_size()}.pt")
    dist.barrier()
    if rank == 0:
        (folder / "latest.new").write_text(path.name)
        (folder / "latest.new").replace(folder / "latest")


def load(folder: Path, model, optimizer, recipe) -> int:
    """The last checkpoint; returns how many steps it has taken. Other world sizes draw noise of their own."""
    path = folder / (folder / "latest").read_text()
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    training = torch.load(path / "training.pt", weights_only=True)
    rng = path / f"rng-{dist.get_rank()}-of-{dist.get_world_size()}.pt"
    if recipe:
        if rng.exists():
            training["recipe"]["rng"] = torch.load(rng, weights_only=True)
        recipe.load_state_dict(training["recipe"], rng=rng.exists())
    return training["step"]


# -- training ---------------------------------------------------------------------------------------------------------


def tokens(args, shape: Shape) -> Batches:
    """Batches of all ranks, from the token cache of `python -m sparse24 pretrain`; rank 0 makes it."""
    settings = Settings(
        data=tuple(args.data), model="llama", ctx=shape.length, tokenizer=args.tokenizer,
        vocab_size=min(shape.vocab, args.vocab), cache_dir=args.cache_dir, device="cpu",
    )  # fmt: skip
    settings = resolve(settings)
    rank = dist.get_rank()
    if rank == 0:
        data = prepare(settings, print)
    dist.barrier()
    data = data if rank == 0 else prepare(settings)
    return Batches(data.train, shape.length, args.batch * dist.get_world_size(), args.seed)


def learning_rate(args, step: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, args.steps // 10)
    progress = min(1.0, max(0, step - warmup) / max(1, args.steps - warmup))
    return args.lr * min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))


def report(shape: Shape, device: torch.device, step: int, loss: float, seconds: float, count: int) -> str:
    """One line of the log. Peak memory is that of this rank: the GPU's, or the process' on a CPU."""
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        limit = next((flops for part, flops in PEAK.items() if part in name), math.nan)
    else:
        peak, limit = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, math.nan
    mfu = shape.flops(count) / seconds / limit
    return (
        f"step {step}  loss {loss:.4f}  {count / seconds:.0f} tokens/s a GPU  MFU {100 * mfu:.1f} %  "
        f"peak {peak / 1e9:.2f} GB"
    )


def train(args, shape: Shape, device: torch.device) -> list[float]:
    """The losses of all steps of this call, averaged over ranks."""
    batches, model = tokens(args, shape), build(args, shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    recipe = None
    if args.arm.startswith("2:4"):
        recipe = sparse24.Recipe(model, optimizer, args.steps, decay=args.decay, mask_interval=args.mask_interval)
    torch.manual_seed(args.seed + 1)  # of the noise, which a checkpoint's states of generators come after
    first = load(args.out, model, optimizer, recipe) if args.resume else 0
    rows, losses, since = slice(dist.get_rank() * args.batch, (dist.get_rank() + 1) * args.batch), [], time.time()
    for step in range(first, args.steps if args.stop is None else args.stop):
        ids, targets = (torch.from_numpy(part[rows]).to(device) for part in batches(step))
        loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()
        if args.float8_scales:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(model)
        losses.append(loss.detach())
        if (step + 1) % args.log_every == 0:
            mean = losses[-1].clone()
            dist.all_reduce(mean)  # waits for the GPU
            seconds, since = (time.time() - since) / args.log_every, time.time()
            line = report(shape, device, step + 1, mean.item() / dist.get_world_size(), seconds, ids.numel())
            if dist.get_rank() == 0:
                print(line, flush=True)
        if args.out and args.save_every and (step + 1) % args.save_every == 0:
            save(args.out, step + 1, model, optimizer, recipe)
            since = time.time()
    means = torch.stack(losses) if losses else torch.zeros(0)
    dist.all_reduce(means)
    return (means / dist.get_world_size()).tolist()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--arm", choices=ARMS, default="2:4")
    parser.add_argument("--layers", type=int, help="fewer blocks than the size has")
    parser.add_argument("--length", type=int, help="tokens of a sequence; default: 8192, tiny 64")
    parser.add_argument("--batch", type=int, default=1, help="sequences a GPU and step")
    parser.add_argument("--steps", type=int, default=100, help="of the whole run")
    parser.add_argument("--stop", type=int, help="end this call after so many steps, as an interrupt would")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--decay", type=float, default=6e-5, help="masked decay of the 2:4 arms")
    parser.add_argument("--mask-interval", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    parser.add_argument("--data", nargs="*", default=[], help="text; default: Python's standard library")
    parser.add_argument("--tokenizer", choices=("bpe", "bytes"), default="bpe")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of the BPE, at most the model's")
    parser.add_argument("--cache-dir", help="where tokens are cached; default: ~/.cache/sparse24")
    parser.add_argument("--out", type=Path, help="folder for checkpoints")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0: none")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.resume or args.save_every) and args.out is None:
        parser.error("--resume and --save-every need --out")
    if args.resume and not (args.out / "latest").is_file():
        parser.error(f"--resume finds no checkpoint in {args.out}; leave it out to begin")
    args.float8_scales = args.arm == "fp8-tensorwise"
    return args


def main() -> None:
    args = arguments()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    shape = SHAPES[args.size]
    shape = replace(shape, layers=args.layers or shape.layers, length=args.length or shape.length)
    losses = train(args, shape, device)
    if dist.get_rank() == 0 and losses:
        print(f"{args.arm}: {len(losses)} steps, last loss {losses[-1]:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
