"""Made-up histories of healthy runs, with noise."""

import numpy as np

from minigpt3d.training.stages import RECIPES, learning_rate


PAPER, HOUSEHOLD = RECIPES["paper"], RECIPES["household"]
GROUPS = {
    "I": ["point_projection"],
    "II": ["point_projection", "qformer", "query_experts", "language_projection", "language_model"],
    "III": ["point_projection", "qformer", "query_experts", "language_projection", "language_model"],
    "IV": ["query_experts", "router"],
    "own": ["point_projection", "qformer", "language_projection", "language_model"],
}


def route(generator, preference: np.ndarray, spread: float, num_used: int = 2) -> dict:
    """Routing of a step: 8 clouds with logits around `preference` (E,), with standard deviation `spread`."""
    logits = preference + spread * generator.normal(size=(8, len(preference)))
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.argsort(-weights, axis=1)[:, :num_used]
    mean = weights.mean(0)
    entropy = -(weights * np.log(weights)).sum(1).mean()
    return {
        "load": (np.bincount(chosen.ravel(), minlength=len(mean)) / 8).tolist(),
        "weight": mean.tolist(),
        "entropy": float(entropy),
        "between": float(-(mean * np.log(mean)).sum() - entropy),
    }


def healthy(stage, num_steps: int, seed: int = 0, first_loss: float = 2.3, last_loss: float = 1.3) -> list[dict]:
    """A healthy run, with the scatter of small batches and occasional gradient spikes."""
    generator = np.random.default_rng(seed)
    preference = generator.normal(size=8)
    history = []
    for step in range(num_steps):
        level = last_loss + (first_loss - last_loss) * np.exp(-5 * step / num_steps)
        lr = learning_rate(stage, step)
        spike = 30 if generator.random() < 0.01 else 1
        entry = {
            "step": step,
            "source": str(generator.choice([source.name for source in stage.mixture])),
            "loss": float(level * np.exp(0.2 * generator.normal())),
            "lr": lr,
            "grad_norm": float(spike * np.exp(0.4 * generator.normal())),
            "samples_per_second": float(40 + 5 * generator.normal()),
            "update_ratio": {g: float(30 * lr * np.exp(0.3 * generator.normal())) for g in GROUPS[stage.name]},
        }
        if stage.router_type != "none":
            entry["router"] = route(generator, preference, spread=1.5 * step / num_steps)
        history.append(entry)
    history[0]["loss"] = first_loss
    history[0]["validation_before"] = first_loss
    history[-1]["validation_after"] = last_loss
    return history
