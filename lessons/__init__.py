"""lessons: twelve notebooks and twelve exercises. README.md is the course, instructor.md is for the teacher.

Nothing here is imported by the other rooms: `qlora grade` starts lessons.grading in a process of its own.
"""
