"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input, told in one line that names the value, what was expected and what to do.

    Not a ValueError: those the command-line parser takes for its own.

    Recipes print the message and exit with code 2, as a rule before anything is trained.
    """

    # Set where several processes found the same mistake and another one tells it.
    told_elsewhere = False
