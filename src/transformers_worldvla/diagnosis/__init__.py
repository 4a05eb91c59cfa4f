"""What is wrong with a checkpoint, a dataset and a simulator that are meant to work together: see `doctor.diagnose`."""

from .doctor import Patient, diagnose
from .report import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "Patient", "diagnose"]
