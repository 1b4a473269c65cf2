"""The programs that run inside a sandbox: standard library only, as few imports as can be, nothing of this package.

They are compiled by the interpreter that runs them and sent to it, so no file of the package is visible inside.
"""
