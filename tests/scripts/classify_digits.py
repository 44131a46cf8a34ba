"""Train a small CNN on scikit-learn's handwritten digits; stop and resume at any epoch."""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stop-after", type=int, default=None)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    checkpoint_path = args.out / "checkpoint.pt"

    digits = load_digits()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_set = TensorDataset(images[:1500], labels[:1500])
    test_images, test_labels = images[1500:], labels[1500:]

    torch.manual_seed(0)
    net = Net().to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = CosineAnnealingLR(optimizer, T_max=args.epochs)
    first_epoch = 0
    if args.resume:
        checkpoint = torch.load(checkpoint_path)
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        first_epoch = checkpoint["epoch"]

    for epoch in range(first_epoch, args.stop_after or args.epochs):
        generator = torch.Generator().manual_seed(epoch)
        loader = DataLoader(
            train_set, 64, shuffle=True, generator=generator, num_workers=args.workers
        )
        net.train()
        total = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(net(inputs.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item() * len(inputs)
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {total / len(train_set):.4f}")
        torch.save(
            {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "epoch": epoch + 1,
            },
            checkpoint_path,
        )

    net.eval()
    with torch.no_grad():
        logits = net(test_images.to(device)).cpu()
        test_loss = nn.functional.cross_entropy(logits, test_labels).item()
    accuracy = (logits.argmax(1) == test_labels).float().mean().item()
    print(f"test: loss {test_loss:.4f}, accuracy {accuracy:.3f}")
    torch.save(net.state_dict(), args.out / "net.pt")
    (args.out / "metrics.json").write_text(json.dumps({"loss": test_loss, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
