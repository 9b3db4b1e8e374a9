"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input, told in one line that names the value, what was expected and what to do.

    Recipes print the message and exit with code 2; nothing has been trained by then.
    """
