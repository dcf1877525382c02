"A verdict is the one that a reader of its interval would give; exposure is what a count of the steps gives."
import math
import numpy as np, pytest
from scipy import stats
from switchable_llm.search.intervals import MARGIN, Interval, crossed_mean, side
from switchable_llm.study.statistics import (
    VERDICTS, Claim, as_good, better, decide, exposure, read, same_exposure, show_exposure)
from switchable_llm.core.profiles import PROFILES, Profile
