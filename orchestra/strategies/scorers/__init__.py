"""The scorers: what `best_of` chooses by, one method a file. Importing this package registers them all."""

from __future__ import annotations

from orchestra.strategies.scorers.base import Scorer, ScorerField
from orchestra.strategies.scorers.bayes_risk import BayesRisk
from orchestra.strategies.scorers.checklist import Checklist
from orchestra.strategies.scorers.judge import Judge
from orchestra.strategies.scorers.logprob import Logprob, MeanLogprob
from orchestra.strategies.scorers.reward import Reward

__all__ = ["BayesRisk", "Checklist", "Judge", "Logprob", "MeanLogprob", "Reward", "Scorer", "ScorerField"]
