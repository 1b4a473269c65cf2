"""The one error that a user is meant to read."""


class UserError(ValueError):
    """Something in the data, the recipe or the model that the user can put right, said in one sentence.

    The command line prints the sentence alone and exits with a non-zero status; everything else keeps its traceback.
    """
