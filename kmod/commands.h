/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_COMMANDS_H
#define SNIFFER_COMMANDS_H

int sniffer_commands_init(void);
void sniffer_commands_exit(void);

#endif /* SNIFFER_COMMANDS_H */
