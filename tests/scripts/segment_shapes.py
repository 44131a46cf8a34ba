"""Train a small fully convolutional network to segment squares and discs in noise."""

import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.optim as optim

CLASSES = 3  # background, square, disc
IGNORE = 255  # the outlines, which belong to neither side
SIZE = 48


def make_sample(generator):
    image = 0.3 * torch.randn(1, SIZE, SIZE, generator=generator)
    label = torch.zeros(SIZE, SIZE, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for shape in (1, 2):
        y, x = torch.randint(10, SIZE - 10, (2,), generator=generator).tolist()
        if shape == 1:
            distance = torch.maximum((rows - y).abs(), (columns - x).abs()).float()
        else:
            distance = ((rows - y) ** 2 + (columns - x) ** 2).float().sqrt()
        label[distance < 8] = shape
        label[(distance >= 7) & (distance < 8)] = IGNORE
        image[0, distance < 8] += 1.0 if shape == 1 else -1.0
    return image, label


def make_set(n, seed):
    generator = torch.Generator().manual_seed(seed)
    samples = [make_sample(generator) for _ in range(n)]
    return torch.stack([image for image, _ in samples]), torch.stack(
        [label for _, label in samples]
    )


def mean_iou(prediction, label):
    valid = label != IGNORE
    scores = []
    for c in range(CLASSES):
        p, t = (prediction == c) & valid, (label == c) & valid
        scores.append((p & t).sum().item() / max(1, (p | t).sum().item()))
    return sum(scores) / CLASSES


def main(out):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (data.to(device) for data in make_set(64, seed=1))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, CLASSES, 1),
    ).to(device)
    class_weight = torch.tensor([0.5, 1.0, 1.0], device=device)
    criterion = nn.CrossEntropyLoss(weight=class_weight, ignore_index=IGNORE)
    optimizer = optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 1e-4},
            {"params": [p for p in model.parameters() if p.dim() == 1]},
        ],
        lr=0.1,
        momentum=0.9,
    )
    epochs, batch = 5, 8
    steps = epochs * len(images) // batch
    poly = optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)

    for epoch in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            loss = criterion(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            poly.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

    model.eval()
    images, labels = (data.to(device) for data in make_set(16, seed=2))
    with torch.no_grad():
        logits = model(images)
        loss = criterion(logits, labels).item()
    iou = mean_iou(logits.argmax(1), labels)
    print(f"test: loss {loss:.4f}, mean IoU {iou:.3f}")
    torch.save(model.state_dict(), out / "net.pt")
    (out / "metrics.json").write_text(json.dumps({"loss": loss, "mean_iou": iou}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
