"""Train a character-level language model with automatic mixed precision."""

import argparse
import json
import os

import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--lr", type=float, default=0.05)
args = parser.parse_args()

text = "".join(f"{i} times {j} is {i * j}. " for i in range(1, 30) for j in range(1, 30))
alphabet = sorted(set(text))
data = torch.tensor([alphabet.index(c) for c in text])
context, batch = 32, 16


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary, dim=64, layers=2, heads=4):
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.02 * torch.randn(context, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, vocabulary))

    def forward(self, tokens, targets):
        logits = self.head(self.blocks(self.token(tokens) + self.position))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


torch.manual_seed(1337)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = LanguageModel(len(alphabet)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
scaler = torch.amp.GradScaler(device)
data = data.to(device)
losses = []
for step in range(args.steps):
    starts = torch.randint(len(data) - context - 1, (batch,)).tolist()
    tokens = torch.stack([data[s : s + context] for s in starts])
    targets = torch.stack([data[s + 1 : s + context + 1] for s in starts])
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(tokens, targets)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    if step % 2:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())
    if step % 20 == 0:
        print(f"step {step}: loss {losses[-1]:.4f}")

final = sum(losses[-10:]) / 10
print(f"loss {final:.4f}, scale {scaler.get_scale():g}")
torch.save(model.state_dict(), os.path.join(args.out, "net.pt"))
with open(os.path.join(args.out, "metrics.json"), "w") as file:
    json.dump({"loss": final, "first": losses[0], "scale": scaler.get_scale()}, file)
