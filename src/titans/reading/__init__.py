"""Reading files of any length: into a memory file, or with a look at what every token does to the memory."""

from titans.reading.memorize import Job, Progress, memorize_files
from titans.reading.page import plot_trace, write_page
from titans.reading.trace import TextTrace, trace_text

__all__ = ["Job", "Progress", "TextTrace", "memorize_files", "plot_trace", "trace_text", "write_page"]
