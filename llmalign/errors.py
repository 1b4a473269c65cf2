"""The errors that a user is meant to read."""


class UserError(ValueError):
    """Something in the data, the recipe or the model that the user can put right, said in one sentence.

    The command line prints the sentence alone and exits with a non-zero status; everything else keeps its traceback.
    """


class OneProcessError(UserError):
    """What happened to one of several processes alone: it says so itself, because the others never hear of it."""
