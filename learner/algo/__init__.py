"""The learner's maths: arrays in, arrays out; torch and numpy alone."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
