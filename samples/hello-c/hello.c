/* Greets whom its arguments name (or the world), and says where it got the greeting from. */

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char *argv[])
{
    const char *greeting = getenv("GREETING");
    if (greeting == NULL)
        greeting = "Hello";

    if (argc < 2)
        printf("%s, World, from C!\n", greeting);
    for (int i = 1; i < argc; i++)
        printf("%s, %s, from C!\n", greeting, argv[i]);
    return EXIT_SUCCESS;
}
