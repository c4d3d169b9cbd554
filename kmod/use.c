// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a process does to a socket: it creates, uses, receives or closes it; it forks,
 * executes a program or exits. The probes call these functions. The hooks call
 * sniffer_use() for a sender on the CPU.
 */
#include <linux/hash.h>
#include <linux/magic.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/pid_namespace.h>
#include <linux/sched/task_stack.h>
#include <asm/syscall.h>
#include <net/inet_sock.h>

#include "alive.h"
#include "compat.h"
#include "create.h"
#include "holders.h"
#include "known.h"
#include "owner.h"
#include "process.h"
#include "use.h"

/* The most descriptors searched for a sender; beyond, only a known number is tried. */
#define USE_WALK_MAX	65536

/* Counts received descriptors. After each, a process may have a socket that it had not. */
static atomic_t use_gains;

/*
 * Is the task one of a process? Of the threads without user space, only io_uring's
 * workers act for one.
 */
static bool use_is_process(const struct task_struct *task)
{
	return !(task->flags & PF_KTHREAD);
}

/* Under RCU. Compares addresses only. */
static bool use_has_at(const struct fdtable *fdt, unsigned long fd, const struct file *file)
{
	return fd < fdt->max_fds && rcu_access_pointer(fdt->fd[fd]) == file;
}

/*
 * Finds a descriptor of @file in current's table, or -1. Nearly always the system call
 * names it: in its first argument, or in the third for splice().
 */
static int use_find_fd(const struct file *file, int hint, bool walk)
{
	unsigned long args[6];
	struct fdtable *fdt;
	int found = -1;
	unsigned int fd;

	if (!current->files)
		return -1;
	rcu_read_lock();
	fdt = files_fdtable(current->files);
	if (!(current->flags & PF_IO_WORKER) && !walk) {
		syscall_get_arguments(current, task_pt_regs(current), args);
		if (use_has_at(fdt, args[0], file))
			found = args[0];
		else if (use_has_at(fdt, args[2], file))
			found = args[2];
	}
	if (found < 0 && hint >= 0 && use_has_at(fdt, hint, file))
		found = hint;
	if (walk && found < 0) {
		unsigned int end = min_t(unsigned int, fdt->max_fds, USE_WALK_MAX);

		for_each_set_bit(fd, fdt->open_fds, end)
			if (rcu_access_pointer(fdt->fd[fd]) == file) {
				found = fd;
				break;
			}
	}
	rcu_read_unlock();
	return found;
}

/*
 * May current be the user of @owner's socket, if it was not the last one? Yes if
 * - it has the socket in its descriptor table;
 * - it has it in an io_uring, and @called;
 * - nobody knows the socket, and current is closing it.
 * In all other cases no. The kernel also sends packets of others in the context
 * of a process:
 * - what a firewall's daemon has judged (NFQUEUE);
 * - requests of a disk whose socket was handed to the kernel (NBD);
 * - what waited while the process looked at the socket (ss, getsockopt());
 * - the end of a socket whose last reference it dropped.
 */
static bool use_is_possible(struct sniffer_gain *gain, const struct sniffer_owner *owner,
			    struct sock *sk, bool called)
{
	struct file *file = gain->sock ? READ_ONCE(gain->sock->file) : NULL;
	u64 cookie = atomic64_read(&sk->sk_cookie);
	int hint = owner ? READ_ONCE(owner->fd) : -1;

	if (!called && owner && READ_ONCE(owner->held) && sniffer_known_looks())
		return false;
	if (file) {
		gain->fd = use_find_fd(file, hint, false);
		if (gain->fd >= 0)
			return true;
	}
	if (!sniffer_probes_alive())
		return true;
	/* a task that must not wait for memory does block I/O for some other process */
	called &= !(current->flags & PF_MEMALLOC);
	if (called && sniffer_has_uring(current)) {
		gain->ring = true;
		return true;
	}
	/*
	 * the table was full, so this socket is in no entry: do not search descriptors
	 * for each packet
	 */
	if (called && !owner && sniffer_owner_full())
		return true;
	if (!file || sniffer_known_stranger(cookie, atomic_read(&use_gains)))
		return false;
	gain->fd = use_find_fd(file, hint, true);
	if (gain->fd >= 0 || (!owner && !file_count(file)))
		return true;
	sniffer_known_keep_stranger(cookie, atomic_read(&use_gains));
	return false;
}

/*
 * Does current work on the MPTCP socket of this subflow @sk? `ip mptcp` opens and
 * closes subflows of other processes, and sends what waits in them.
 */
static bool use_is_of_parent(struct sock *sk)
{
	struct sniffer_gain gain = { .sock = READ_ONCE(sk->sk_socket) };
	struct sniffer_owner *owner;
	struct sniffer_proc *user;
	bool uses;
	u64 inode;

	rcu_read_lock();
	inode = sniffer_owner_inode(sk);
	owner = inode ? sniffer_owner_find_inode(inode) : NULL;
	user = owner ? rcu_dereference(owner->user) : NULL;
	uses = (user && sniffer_process_is(user, current)) ||
	       use_is_possible(&gain, owner, sk, false);
	rcu_read_unlock();
	return uses;
}

/* Enters what current has got. A full process table is counted. */
static void use_gain(struct sock *sk, struct sniffer_gain *gain)
{
	gain->proc = sniffer_process_get(current);
	if (!gain->proc) {
		sniffer_owner_count_full();
		return;
	}
	sniffer_process_refresh(gain->proc);
	/* another process that shares the table (clone() with CLONE_FILES) has it at once */
	gain->many = current->files &&
		     atomic_read(&current->files->count) > get_nr_threads(current);
	if (!sniffer_probes_tell_release())
		gain->sock = NULL;
	sniffer_owner_gain(sk, gain);
	sniffer_process_put(gain->proc);
}

/*
 * Does this use of @owner's socket by current tell nothing new? Nearly always current
 * used it last, and this function only reads. Under RCU.
 */
static bool use_is_known(struct sniffer_owner *owner, const struct sock *sk)
{
	struct sniffer_proc *user = rcu_dereference(owner->user);

	if (!user || !sniffer_process_is(user, current) || READ_ONCE(owner->via) ||
	    !READ_ONCE(owner->held) || READ_ONCE(owner->guess) ||
	    owner->port != inet_sk(sk)->inet_num || !READ_ONCE(owner->tid))
		return false;
	/* all threads share this cache line: write only for somebody who reads it */
	if (READ_ONCE(owner->tid) != current->pid && static_branch_unlikely(&sniffer_listening))
		WRITE_ONCE(owner->tid, current->pid);
	if (unlikely(!sniffer_probes_alive()))
		WRITE_ONCE(owner->seen, jiffies);
	sniffer_process_refresh(user);
	return true;
}

/* Under RCU. The entry does not settle it: is this current's use? If so, @gain says how. */
static bool use_is_mine(struct sniffer_gain *gain, struct sniffer_owner *owner, struct sock *sk,
			bool called)
{
	struct sniffer_proc *user = owner ? rcu_dereference(owner->user) : NULL;
	struct file *file;
	bool held;

	if (!user || READ_ONCE(owner->via) || !sniffer_process_is(user, current))
		return use_is_possible(gain, owner, sk, called);
	held = READ_ONCE(owner->held);
	file = gain->sock ? READ_ONCE(gain->sock->file) : NULL;
	gain->fd = file ? use_find_fd(file, READ_ONCE(owner->fd), false) : -1;
	gain->ring = READ_ONCE(owner->ring) ||
		     (!held && gain->fd < 0 && sniffer_has_uring(current));
	return true;
}

/* Does @owner's user finish a socket that it has already closed? That is no new use. */
static bool use_is_over(const struct sniffer_owner *owner)
{
	const struct sniffer_proc *user = rcu_dereference(owner->user);

	return user && !READ_ONCE(owner->via) && !READ_ONCE(owner->held) &&
	       sniffer_process_is(user, current);
}

/* Under RCU. sniffer_use() for the cases that @owner's entry does not settle. */
static noinline bool use_find_out(struct sock *sk, struct sniffer_owner *owner, bool called)
{
	struct socket *sock = READ_ONCE(sk->sk_socket);
	struct sniffer_gain gain = { .tid = current->pid, .fd = -1, .sock = sock };

	if (!use_is_process(current)) {
		if (called && owner)
			sniffer_owner_take(owner);
		return true;
	}
	if (!sniffer_owner_wants(sk))
		return called || use_is_of_parent(sk);
	/* no file: a socket of the kernel that was only created here (nvmet) */
	if (sock && !READ_ONCE(sock->file))
		return false;
	if (!called && owner && use_is_over(owner))
		return true;
	if (!use_is_mine(&gain, owner, sk, called))
		return false;
	gain.inode = sniffer_owner_inode(sk);
	use_gain(sk, &gain);
	return true;
}

/**
 * sniffer_use - the current process uses a socket, or seems to use it
 * @sk: full socket; from a probe, or from LOCAL_OUT if current may be trusted
 * @called: from a probe: current made a call on this very socket
 * @found: set to the socket's entry; may be NULL
 *
 * Under RCU, or with preemption off.
 *
 * Return: false if it is the use of another process.
 */
bool sniffer_use(struct sock *sk, bool called, struct sniffer_found *found)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);
	const struct socket *sock;
	struct sniffer_owner *owner;
	unsigned int version;
	bool mine;

	rcu_read_lock();
	version = sniffer_owner_version(sniffer_owner_stripe(cookie));
	sock = READ_ONCE(sk->sk_socket);
	owner = sniffer_owner_find(cookie);
	mine = owner && sock && READ_ONCE(sock->file) && use_is_known(owner, sk);
	if (likely(mine)) {
		if (called)
			sniffer_known_keep(sk, owner, version);
	} else {
		mine = use_find_out(sk, owner, called);
		if (found && !owner) {
			owner = sniffer_owner_find(atomic64_read(&sk->sk_cookie));
			version = 1;	/* it was read of another stripe if there was no cookie */
		}
	}
	if (found)
		*found = (struct sniffer_found){ owner, version };
	rcu_read_unlock();
	return mine;
}

/* The same where an entry may be there, or has to be looked for. */
static noinline void use_create(struct sock *sk, struct socket *sock)
{
	struct sniffer_gain gain = {
		.tid = current->pid, .inode = SOCK_INODE(sock)->i_ino, .sock = sock, .fd = -1,
	};

	use_gain(sk, &gain);
}

/**
 * sniffer_use_create - the current process, or the kernel, made or accepted a socket
 * @sk: full socket
 * @sock: its socket; @sk may not point to it yet
 */
void sniffer_use_create(struct sock *sk, struct socket *sock)
{
	if (!sniffer_owner_wants(sk))
		return;
	if (!use_is_process(current))
		sniffer_owner_serve(sk, sock);
	else if (!sniffer_create(sk, sock))
		use_create(sk, sock);
}

/**
 * sniffer_use_receive - the current process got a descriptor of a socket
 * @sk: full socket
 * @file: its file
 */
void sniffer_use_receive(struct sock *sk, struct file *file)
{
	struct sniffer_gain gain = {
		.tid = current->pid, .inode = file_inode(file)->i_ino,
		.sock = SOCKET_I(file_inode(file)), .fd = -1, .flags = SNIFFER_F_INHERITED,
	};

	if (!sniffer_owner_wants(sk) || !use_is_process(current))
		return;
	atomic_inc(&use_gains);
	use_gain(sk, &gain);
}

/**
 * sniffer_use_fork - a child got copies of its parent's descriptors, or shares them
 * @child: does not run yet
 */
void sniffer_use_fork(struct task_struct *child)
{
	struct sniffer_proc *proc;

	if (child->tgid == current->tgid || child->flags & PF_KTHREAD)
		return;
	rcu_read_lock();
	proc = sniffer_process_find(current);
	if (proc) {
		WRITE_ONCE(proc->child, child->tgid);
		WRITE_ONCE(proc->forked, sniffer_owner_tick());
	}
	rcu_read_unlock();
}

/*
 * Queues a search for new owners of current's sockets, to run when its descriptors are
 * gone. If @ring goes too, another search follows later.
 */
static void use_settle_later(bool ring)
{
	struct sniffer_proc *proc;

	rcu_read_lock();
	proc = sniffer_process_find(current);
	if (proc && list_empty(&proc->uses))
		proc = NULL;
	if (proc && ring && sniffer_has_uring(current))
		sniffer_process_doubt(proc);
	if (proc && !refcount_inc_not_zero(&proc->refs))
		proc = NULL;
	rcu_read_unlock();
	if (proc)
		sniffer_holders_settle_later(0, proc);
}

/**
 * sniffer_use_rings_end - the current process closes rings, or removes all their files,
 * perhaps by exec
 */
void sniffer_use_rings_end(void)
{
	use_settle_later(true);
}

/**
 * sniffer_use_end - the last thread of the current process exits; it still has its
 * descriptors
 */
void sniffer_use_end(void)
{
	use_settle_later(false);
}

/**
 * sniffer_use_thread_end - a thread of the current process exits, but not the last one
 *
 * It may have a descriptor table of its own (unshare() with CLONE_FILES), which ends
 * with it.
 */
void sniffer_use_thread_end(void)
{
	const struct files_struct *files = current->files;

	if (files && atomic_read(&files->count) == 1)
		use_settle_later(false);
}

/* Under RCU. Does the user @proc share this very table (clone() with CLONE_FILES)? */
static bool use_shares_table(const struct sniffer_proc *proc, const struct files_struct *files)
{
	struct pid *pid;
	struct task_struct *task;

	if (atomic_read(&files->count) < 2)
		return false;
	pid = find_pid_ns(proc->tgid, &init_pid_ns);
	task = pid ? pid_task(pid, PIDTYPE_TGID) : NULL;
	return task && READ_ONCE(task->files) == files;
}

/**
 * sniffer_use_close_file - the current process removes a descriptor of a file
 * @file: any file; the caller is under RCU, or has a reference
 * @fd: its number; -1: not known
 *
 * This matters only for the last user, and only if the socket lives on. Packets are
 * never named after another holder. The release of the socket reports the last
 * reference.
 */
void sniffer_use_close_file(struct file *file, int fd)
{
	struct files_struct *files = current->files;
	struct sniffer_proc *user;
	struct sniffer_owner *owner;
	struct sock *sk;
	u64 cookie = 0;

	if (likely(file_inode(file)->i_sb->s_magic != SOCKFS_MAGIC)) {
		/* a ring takes along the sockets that only it has */
		if (unlikely(sniffer_has_uring(current) && sniffer_is_uring(file)))
			use_settle_later(true);
		return;
	}
	if (file_count(file) < 2 || !files)
		return;
	rcu_read_lock();
	sk = sniffer_owner_sock(file);
	owner = sk ? sniffer_owner_find(atomic64_read(&sk->sk_cookie)) : NULL;
	user = owner ? rcu_dereference(owner->user) : NULL;
	if (user && READ_ONCE(owner->held) &&
	    (sniffer_process_is(user, current) || use_shares_table(user, files))) {
		if (fd >= 0)
			WRITE_ONCE(owner->fd, fd);
		cookie = owner->cookie;
	}
	rcu_read_unlock();
	if (cookie)
		sniffer_holders_settle_later(cookie, NULL);
}

/**
 * sniffer_use_close - the current process removes a descriptor
 * @fd: its number; it is still in the table
 */
void sniffer_use_close(unsigned int fd)
{
	struct fdtable *fdt;
	struct file *file;

	if (unlikely(!current->files))
		return;
	rcu_read_lock();
	fdt = files_fdtable(current->files);
	file = fd < fdt->max_fds ? rcu_dereference(fdt->fd[fd]) : NULL;
	if (file)
		sniffer_use_close_file(file, fd);
	rcu_read_unlock();
}

/**
 * sniffer_use_close_range - the current process removes a range of descriptors
 * @fd: the first
 * @last: the last; may lie beyond the table
 */
void sniffer_use_close_range(unsigned int fd, unsigned int last)
{
	bool shared = current->files &&
		      atomic_read(&current->files->count) > get_nr_threads(current);

	/*
	 * close_range() may first copy a shared table, or only act at exec: search for
	 * all sockets
	 */
	if (shared)
		sniffer_holders_settle_later(0, NULL);
	else if (fd == last)
		sniffer_use_close(fd);
	else
		use_settle_later(false);
}
