"""Which logged metrics are drawn, with their titles and units: what every picture and page of a run says of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One plot: the logged metric, its title and its unit, and a level to mark where there is one."""

    metric: str
    title: str
    unit: str
    level: float | None = None


PANELS = (
    Panel("rewards/accuracies", "Reward accuracy", "share of pairs", 0.5),
    Panel("rewards/margins", "Reward margin", "chosen minus rejected, beta x nats", 0.0),
    Panel("drift/chosen", "Drift of the chosen log-prob", "nats against the reference", 0.0),
    Panel("loss", "Loss", "as the method defines it"),
)
SAMPLED_PANELS = (
    Panel("reward", "Reward of the samples", "mean over completions"),
    Panel("js", "Jensen-Shannon divergence to the target", "nats", 0.0),
    Panel("satisfied", "Completions that satisfy the constraint", "share"),
    Panel("target_reward", "Reward of the policy", "reward"),
    Panel("critic/explained_variance", "Explained variance of the critic", "share", 0.0),
    Panel("kl_to_reference", "Divergence from the reference", "nats a completion", 0.0),
    Panel("entropy", "Entropy of the samples", "nats a token"),
    Panel("residual", "CoPG's residual", "reward"),
    Panel("accuracy", "Accuracy", "share of pairs", 0.5),
    Panel("margin", "Margin of the scores", "chosen minus rejected", 0.0),
    Panel("mean_token_accuracy", "Next-token accuracy", "share of tokens"),
)
IMAGE_PANELS = (
    Panel("reward", "Reward of the pictures", "as its function gives it"),
    Panel("rewards/accuracies", "Reward accuracy", "share of pairs", 0.5),
    Panel("rewards/margins", "Reward margin", "chosen minus rejected, beta x score", 0.0),
    Panel("error/chosen", "Denoising error of the winners", "mean square"),
    Panel("error/rejected", "Denoising error of the losers", "mean square"),
    Panel("error/winner_ratio", "The winners' error over the reference's", "ratio", 1.0),
    Panel("seppo/lagging", "Rows in which the policy lags behind", "share"),
    Panel("ratios/clipped", "Ratios outside of the band", "share"),
    Panel("loss", "Loss", "as the method defines it"),
)
