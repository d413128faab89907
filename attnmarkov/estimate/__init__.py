"""Learning a CCMC from prompts: what they identify, the estimate, and how sure it is."""

from attnmarkov.estimate.attention import AttentionFit, fit_attention
from attnmarkov.estimate.bootstrap import BootstrapFits, bootstrap, bootstrap_trajectory
from attnmarkov.estimate.budget import BudgetComparison, learn_with_budget
from attnmarkov.estimate.coverage import Coverage, coverage
from attnmarkov.estimate.existence import maximum_exists
from attnmarkov.estimate.fisher import (
    InformationTrace,
    fisher_information,
    information_trace,
    observed_information,
    score_information,
)
from attnmarkov.estimate.fit import fit
from attnmarkov.estimate.implicit_bias import GraphSVM, Path, gradient_descent_path, graph_svm
from attnmarkov.estimate.information_growth import InformationGrowth, information_growth
from attnmarkov.estimate.information_rollout import rollout_information
from attnmarkov.estimate.intervals import Intervals, intervals
from attnmarkov.estimate.learnable import LearnableContrasts, learnable_contrasts
from attnmarkov.estimate.likelihood_ratio import LikelihoodRatioTest, likelihood_ratio_test
from attnmarkov.estimate.planning import prompts_needed
from attnmarkov.estimate.position_solution import (
    PositionSolution,
    PositionStatus,
    solve_positions,
)
from attnmarkov.estimate.positions import (
    PositionFit,
    fit_positions,
    position_information,
    window_prompts,
)
from attnmarkov.estimate.prior import Prior
from attnmarkov.estimate.result import Fit
from attnmarkov.estimate.risk import excess_risk
from attnmarkov.estimate.status import Status
from attnmarkov.estimate.teacher_student import learning_exponents, teacher_student
from attnmarkov.estimate.trajectory import fit_trajectory, trajectory_prompts

__all__ = [
    "AttentionFit",
    "BootstrapFits",
    "BudgetComparison",
    "Coverage",
    "Fit",
    "GraphSVM",
    "InformationGrowth",
    "InformationTrace",
    "Intervals",
    "LearnableContrasts",
    "LikelihoodRatioTest",
    "Path",
    "PositionFit",
    "PositionSolution",
    "PositionStatus",
    "Prior",
    "Status",
    "bootstrap",
    "bootstrap_trajectory",
    "coverage",
    "excess_risk",
    "fisher_information",
    "fit",
    "fit_attention",
    "fit_positions",
    "fit_trajectory",
    "gradient_descent_path",
    "graph_svm",
    "information_growth",
    "information_trace",
    "intervals",
    "learn_with_budget",
    "learnable_contrasts",
    "learning_exponents",
    "likelihood_ratio_test",
    "maximum_exists",
    "observed_information",
    "position_information",
    "prompts_needed",
    "rollout_information",
    "score_information",
    "solve_positions",
    "teacher_student",
    "trajectory_prompts",
    "window_prompts",
]
