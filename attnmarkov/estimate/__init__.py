"""Learning a CCMC from prompts: what they identify, the estimate, and how sure it is."""

from attnmarkov.estimate.coverage import Coverage, coverage
from attnmarkov.estimate.fisher import InformationTrace, fisher_information, information_trace
from attnmarkov.estimate.fit import fit
from attnmarkov.estimate.result import Fit
from attnmarkov.estimate.risk import excess_risk
from attnmarkov.estimate.status import Status

__all__ = [
    "Coverage",
    "Fit",
    "InformationTrace",
    "Status",
    "coverage",
    "excess_risk",
    "fisher_information",
    "fit",
    "information_trace",
]
