"""grading: run a student's file and say what is right.

cases.py    a case, its typical mistakes, what makes two values equal
wire.py     values as bytes, for the pipe between the two processes
student.py  the process that runs the student's file and only answers calls
process.py  that process as a function to call, under limits of time and memory
judge.py    the process that knows the answers: cases, verdicts, the report
"""

from .cases import Case, Forbidden, Mistake

__all__ = ["Case", "Forbidden", "Mistake"]
