"""The local page, `facelora page`: the whole job in a browser, for people without another program.

It is one plain Starlette application, so that another program can mount it too. Training and drawing are the commands of this
project, each a process of its own. They continue if the page is killed, and are cancelled by ending the process.
"""
