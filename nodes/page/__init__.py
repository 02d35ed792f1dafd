"""The local page, `facelora page`: the whole job in a browser, for people without another program.

It is one plain Starlette application, so that another program can mount it too. Training and drawing are the commands of this
project, each as a process of its own: they go on when the page ends, and ending a process is how one is cancelled.
"""
