"""Processes of Fiber train one model in shared memory (Hogwild), and send tensors back."""

import torch
import torch.multiprocessing  # has tensors shared, not copied, when they are passed on
from torch import nn

import fiber

TRUE = torch.tensor([[2.0, -1.0]])


def train(model, queue, received, seed):
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(300):
        x = torch.randn(16, 2)
        loss = nn.functional.mse_loss(model(x), x @ TRUE.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    queue.put((seed, model.weight.detach().clone(), loss.item()))
    received.wait(50)  # a shared tensor needs its sender until it has been received


if __name__ == "__main__":
    context = fiber.get_context("spawn")
    model = nn.Linear(2, 1)
    model.share_memory()
    queue, received = context.Queue(), context.Event()
    processes = [
        context.Process(target=train, args=(model, queue, received, seed)) for seed in range(2)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=50) for _ in processes]
    received.set()
    for process in processes:
        process.join()
    print("exit codes:", *(process.exitcode for process in processes))
    print("seeds:", sorted(seed for seed, _, _ in results))
    print("sent back:", all(torch.allclose(weight, TRUE, atol=0.01) for _, weight, _ in results))
    print("shared:", torch.allclose(model.weight, TRUE, atol=0.01))
