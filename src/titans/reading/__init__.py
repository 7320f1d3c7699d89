"""Reading files of any length: into a memory file, or with a look at what every token does to the memory."""

from titans.reading.memorize import Job, Progress, memorize_files

__all__ = ["Job", "Progress", "memorize_files"]
