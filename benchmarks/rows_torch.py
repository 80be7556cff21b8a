"""Steps on an embedding table in PyTorch, for rows.py: some for every line that it is sent."""

import json
import sys
import time

import numpy as np
import torch


def main():
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    rows, width = settings["shape"]
    table = torch.nn.Embedding(rows, width, sparse=True)
    with np.load(settings["data"]) as data:
        ids, y = torch.tensor(data["ids"].astype(np.int64)), torch.tensor(data["y"])
    kinds = {"Adagrad": torch.optim.Adagrad, "SparseAdam": torch.optim.SparseAdam}
    optimizer = kinds[settings["optimizer"]](table.parameters(), lr=settings["rate"])

    def step(i):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.mean((table(ids[i % len(ids)]).sum(-1) - y) ** 2)
        loss.backward()
        optimizer.step()

    for i in range(len(ids)):
        step(i)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for i in range(settings["steps"]):
            step(i)
        print((time.perf_counter() - start) / settings["steps"], flush=True)


if __name__ == "__main__":
    main()
