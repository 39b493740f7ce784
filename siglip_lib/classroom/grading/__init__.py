"""Grades answers to exercises in processes of their own, with limits: for those whom nobody watches while they run.

``apart`` starts one process for a notebook's answers (``__main__``), which forks one for each answer (``answer``).
Only that child runs the student's code, and of it only what the answer needs (``needed``). It has a limit of time and
one of memory (``limits``). Where the kernel offers Landlock (``landlock``) it writes only into a folder that is deleted
afterwards and reads only Python and this library; from version 4 on (Linux 6.7) it also opens no TCP connection, from
version 6 on (6.12) it sends no signal to others. The grader never runs the code, nor unpickles what comes from it.

No grader that runs an answer and its check in one process is a sandbox, and this is none. It notices endless loops,
memory, ``sys.exit`` and ``os._exit``, killed processes, and functions of torch, numpy or this library that were
replaced (``patches``). It does not notice code that sets out to deceive: that can read the checks, which ship with the
library and say what is right, look into the check's frames, or undo its patches before it returns. Without Landlock it
can also read and change the files of whoever grades. So read the answers that you give points for, and grade strangers'
work in a container, or as a user who owns nothing else.
"""

from siglip_lib.classroom.grading.apart import Answer, grade_apart
from siglip_lib.classroom.grading.limits import Limits

__all__ = ["Answer", "Limits", "grade_apart"]
